"""Steps of every transform that is elementwise or sums over axes, by turns with moving the same bytes.

`python -m benchmarks.field --threads 2 --out docs/measurements.md` writes the table. With `--processor`
times are those of the process, for machines that have other work.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from benchmarks.report import write_section
from benchmarks.shapes import SETS, Shapes
from benchmarks.worker import CACHED, FALLBACK, Run
from heavyball import chainable as C

MARK = "field"
GOAL = 1.15
# what is moved to find how fast the machine is in the moment of a step, in float32 numbers of a vector
STREAM = 2**23
CHAINS: dict[str, str] = {
    "Adam": "scale_by_adam",
    "AdaBelief": "scale_by_adabelief",
    "Adan": "scale_by_adan",
    "Yogi": "scale_by_yogi",
    "NovoGrad": "scale_by_novograd",
    "Tiger": "exp_avg | sign",
    "AdamS": "scale_by_adams",
    "AdEMAMix": "scale_by_ademamix",
    "Grokfast": "grokfast | scale_by_adam",
    "RAdam": "scale_by_radam",
    "Adagrad": "scale_by_adagrad",
    "Adadelta": "scale_by_adadelta",
    "Adamax": "scale_by_adamax",
    "ASGD": "asgd_rate | running_average",
    "Rprop": "scale_by_rprop",
    "Adafactor": "factored_rms | clip_update_rms | relative_step | scale_lr_by_parameter_rms",
    "LAMB": "scale_by_adam | trust_ratio",
    "LARS": "lars_ratio | exp_avg",
    "CAME": "scale_by_came",
    "SM3": "scale_by_sm3",
    "Adam-mini": "scale_by_adam(square='row')",
    "SinkGD": "exp_avg | sinkhorn_normalize",
    "primal averaging": "scale_by_adam | primal_average",
    "lookahead": "scale_by_adam | descend | lookahead",
    "hyperball": "scale_by_adam | route(when(hyperball, min_ndim=2), otherwise=descend)",
    "SPAM": "clip_spikes | reset_moments | scale_by_adam",
    "StableSPAM": "stable_spam",
    "AdaGC": "adagc | scale_by_adam",
    "ZClip": "zclip | scale_by_adam",
    "Kourkoutas": "kourkoutas_beta2 | scale_by_adam",
    "D-Adapt Adam": "d_adapt_adam",
    "D-Adapt SGD": "d_adapt_sgd",
    "D-Adapt Lion": "d_adapt_lion",
    "DoG": "dog_rate",
    "DoWG": "dowg_rate",
    "MoMo": "momo",
    "MoMo-Adam": "momo_adam",
    "Mechanic": "scale_by_adam | mechanic",
    "COCOB": "cocob",
}


@dataclass
class Measured:
    """Seconds of steps and of moving two vectors beside them, and what a step moves, in bytes."""

    label: str
    times: list[float]
    streams: list[float]
    once: int
    passes: int
    walks: int
    notes: list[str]

    def over(self, moved: int) -> float:
        """The median of a step's time over that of moving so many bytes beside it."""
        unit = moved / (3 * 4 * STREAM)
        pairs = zip(self.times, self.streams, strict=True)
        return median(step / (unit * stream) for step, stream in pairs)


def build(chain: str) -> Callable[[Any], C.ChainOpt]:
    """What builds the optimizer of a chain from parameters."""
    return lambda params: C.ChainOpt(params, 1e-3, *C.parse(chain))


def measured(
    label: str, chain: str, shapes: Shapes, steps: int, clock: Callable[[], float]
) -> Measured:
    """Time an optimizer by turns with a stream."""

    def timed(function: Callable[[], Any]) -> float:
        start = clock()
        function()
        return clock() - start

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(build(chain), shapes, "float32")
        takes_loss = run.optimizer.chain.reads_loss
        step = (lambda: run.optimizer.step(loss=1.0)) if takes_loss else run.step
        a, b = torch.zeros(STREAM), torch.ones(STREAM)
        times, streams = [], []
        for number in range(steps + 3):
            run.give_gradients()
            before = timed(lambda: a.add_(b, alpha=0.5))
            taken = timed(step)
            after = timed(lambda: a.add_(b, alpha=0.5))
            if number >= 3:
                times.append(taken)
                streams.append((before + after) / 2)
    plan = run.optimizer.plan()
    once = sum(_once(run, p) for p in run.params)
    by_purpose: dict[str, int] = {}
    for kernel in plan.kernels:
        by_purpose[kernel.purpose] = max(kernel.passes, by_purpose.get(kernel.purpose, 0))
    walks = sum(by_purpose.values())
    notes = [str(w.message) for w in caught if FALLBACK in str(w.message)]
    return Measured(label, times, streams, once, _passes(run, plan), walks, notes)


def _once(run: Run, p: torch.Tensor) -> int:
    held = (t for t in run.optimizer.state[p].values() if isinstance(t, torch.Tensor))
    size = p.element_size() * p.numel()
    return 3 * size + 2 * sum(t.numel() * t.element_size() for t in held)


def _passes(run: Run, plan: Any) -> int:
    """What all passes move, where a tensor does not stay in a core's cache between two of them."""
    small = sum(_once(run, p) for p in run.params if p.numel() <= CACHED)
    share = sum(p.numel() for p in run.params if p.numel() > CACHED)
    share /= sum(p.numel() for p in run.params)
    return round(small + share * plan.bytes_moved)


def rows(found: list[Measured]) -> Iterator[str]:
    """The lines of the table."""
    yield "| transform | ms | MB once | x floor once | MB in passes | x floor in passes | passes |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for m in found:
        cells = (
            f"{1e3 * median(m.times):.1f}",
            f"{m.once / 1e6:.0f}",
            f"{m.over(m.once):.2f}",
            f"{m.passes / 1e6:.0f}",
            f"{m.over(m.passes):.2f}",
            f"{m.walks}",
        )
        yield f"| {m.label} | {' | '.join(cells)} |" + (f" {m.notes[0]}" if m.notes else "")


@click.command()
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--steps", type=int, default=30, show_default=True, help="Timed steps of each.")
@click.option("--set", "name", type=click.Choice(list(SETS)), default="gpt", show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(CHAINS)), help="[default: all]")
@click.option("--processor", is_flag=True, help="The time of the process, not of the clock.")
@click.option("--out", type=click.Path(path_type=Path), help="Document to update.")
def main(
    threads: int,
    steps: int,
    name: str,
    only: tuple[str, ...],
    processor: bool,
    out: Path | None,
) -> None:
    """Time steps by turns with moving the same bytes."""
    before, found = f"load {os.getloadavg()[0]:.1f} before the run", list[Measured]()
    clock = time.process_time if processor else time.perf_counter
    torch.set_num_threads(threads)
    start = time.perf_counter()
    for label in only or CHAINS:
        found.append(measured(label, CHAINS[label], SETS[name](), steps, clock))
        lines = list(rows(found[-1:]))
        click.echo(lines[-1])
    click.echo(f"{time.perf_counter() - start:.0f} s", err=True)
    if out is None:
        return
    chains = "\n".join(f"- {label}: `{CHAINS[label]}`" for label in (only or CHAINS))
    text = "\n".join(rows(found))
    command = f"python -m benchmarks.field --threads {threads} --steps {steps} --set {name}"
    command += " --processor" if processor else ""
    heading = f"""## The field's transforms and their memory

- command: `{command} --out docs/measurements.md`
- {os.cpu_count()} cores, {threads} threads used, {before}, torch {torch.__version__}

Each step stands between two `a.add_(b, alpha=s)` of {STREAM:,} float32 numbers, which say how fast
memory is in this moment; "x floor" is the median of a step's time over that of moving its bytes so.
"Once" and "in passes" are as in the tables below."""
    write_section(out, MARK, f"{heading}\n\n{text}\n\nThe chains:\n\n{chains}")


if __name__ == "__main__":
    main()
