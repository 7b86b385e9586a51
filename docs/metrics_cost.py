"""What `metrics=True` and a probe add to a step: two optimizers by turns.

python docs/metrics_cost.py [--shapes gpt] [--rounds 60] [--threads 1]

The time is that of the processor, not of the wall, so other work on the machine is no part of it.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import heavyball
from benchmarks.shapes import SETS
from heavyball import chainable as C

WARMUP = 5
PROBED = (C.scale_by_adam, C.probe("adam"))
WAYS = {
    "metrics=True": lambda params: heavyball.AdamW(params, metrics=True),
    "metrics=True and a probe": lambda params: C.ChainOpt(params, 1e-3, *PROBED, metrics=True),
}


def cost(make, shapes: str, rounds: int) -> tuple[float, float]:
    """Milliseconds of a step of plain AdamW, and by how many percent the other takes longer."""
    optimizers, times = [], ([], [])
    for build in (heavyball.AdamW, make):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(0.02 * torch.randn(shape)) for shape in SETS[shapes]()]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizers.append(build(params))
    for turn in range(-WARMUP, rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            start = time.process_time()
            optimizers[which].step()
            if turn >= 0:
                times[which].append(time.process_time() - start)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    return 1e3 * statistics.median(times[0]), 100 * (ratio - 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", choices=sorted(SETS), default="gpt")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name, make in WAYS.items():
        plain, more = cost(make, given.shapes, given.rounds)
        print(f"{given.shapes}: AdamW {plain:.1f} ms; {name}: {more:+.1f} percent")


if __name__ == "__main__":
    main()
