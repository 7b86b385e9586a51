"""Trains a sample of optimizers, stops in the middle, and goes on: here, or in another process.

python continued.py SAVED RESULTS: goes on from what `begin` has saved.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from helpers import (
    CASES,
    KINDS,
    QUICK,
    STORED,
    Case,
    Tiny,
    all_params,
    averages,
    fill_gradients,
    parameters,
    random_chain,
    snapshot,
)
from torch import nn
from torch.optim import lr_scheduler

from heavyball import utils

STEPS, STOP = 5, 3
SAMPLE = [*CASES, *(random_chain(seed) for seed in range(8)), *STORED]
# With kernels: one of each kind, since each must be built.
COMPILED = ("AdamW", "SFAdamW", "guarded")

Run = tuple[Any, ...]


def runs() -> Iterator[tuple[str, Case, torch.dtype, str, bool]]:
    """Every run by its name: an optimizer, a dtype, the mode to stop in, and whether in kernels.

    `make test` stops every optimizer in one of its modes.
    """
    for number, case in enumerate(SAMPLE):
        shown = case(parameters((2, 2), dtype=torch.bfloat16))
        modes = ("train", "eval") if averages(shown) else ("train",)
        modes = (modes[number % len(modes)],) if QUICK else modes
        # bfloat16 of the others in test_presets
        dtypes = [torch.bfloat16] if case.name == "storage param" else [torch.float32]
        dtypes += [torch.bfloat16] if case in KINDS else []
        for dtype in dtypes:
            for mode in modes:
                for compiled in (False, True):
                    if not compiled or case.name in COMPILED:
                        name = f"{case.name} {dtype} {mode} {'kernel' if compiled else ''}"
                        yield name, case, dtype, mode, compiled


def build(case: Case, dtype: torch.dtype, compiled: bool, fresh: bool) -> Run:
    """A model, its optimizer and its schedule; if not `fresh`, with values that must be replaced."""
    utils.compile_mode = "auto" if compiled else None
    model = Tiny(seed=0 if fresh else 7, dtype=dtype)
    if case in STORED:  # large enough for 8-bit codes
        model.large = nn.Parameter(torch.full((66, 65), 0.5, dtype=dtype))
    named = list(model.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    opt = case(groups, lr=0.05 if fresh else 0.5, seed=3 if fresh else 4)
    opt.param_groups[0]["lr"] /= 2
    opt.param_groups[0]["warmup_steps"] = 4 if fresh else 0
    return model, opt, SCHEDULES[len(case.name) % len(SCHEDULES)](opt)


def one_cycle(opt: Any) -> Any:
    """A schedule that changes momentum or betas too, where there are some."""
    cycles = "betas" in opt.defaults or "momentum" in opt.defaults
    return lr_scheduler.OneCycleLR(opt, 0.1, total_steps=9, cycle_momentum=cycles)


SCHEDULES = (
    lambda opt: lr_scheduler.CosineAnnealingLR(opt, T_max=9),
    lambda opt: lr_scheduler.StepLR(opt, step_size=2),
    one_cycle,
)


def advance(run: Run, seeds: range) -> None:
    """Train; at each step another parameter has no gradient."""
    _, opt, schedule = run
    opt.train()
    for seed in seeds:
        params = all_params(opt)
        fill_gradients(params, seed)
        params[seed % 5 % len(params)].grad = None
        opt.step()
        schedule.step()


def ending(run: Run) -> dict[str, Any]:
    """Everything that two runs must have in common at the end."""
    opt = run[1]
    found = snapshot(opt)
    if averages(opt):
        found |= {f"average {key}": value for key, value in snapshot(opt.eval()).items()}
    return found


def begin() -> tuple[dict[str, Any], dict[str, Any]]:
    """What every run saves when it stops, and how it ends if it does not."""
    saved, endings = {}, {}
    for name, case, dtype, mode, compiled in runs():
        run = build(case, dtype, compiled, fresh=True)
        advance(run, range(STOP))
        run[1].train(mode == "train")
        saved[name] = torch_copy([thing.state_dict() for thing in run])
        advance(run, range(STOP, STEPS))
        endings[name] = ending(run)
    return saved, endings


def torch_copy(thing: Any) -> Any:
    """A copy, since a state dict shares its tensors with what it was taken from."""
    if isinstance(thing, torch.Tensor):
        return thing.clone()
    if isinstance(thing, dict):
        return {key: torch_copy(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return type(thing)(torch_copy(value) for value in thing)
    return thing


def resume(saved: dict[str, Any]) -> dict[str, Any]:
    """How every run ends that goes on from what was saved."""
    endings = {}
    for name, case, dtype, _, compiled in runs():
        run = build(case, dtype, compiled, fresh=False)
        for thing, state in zip(run, saved[name], strict=True):
            thing.load_state_dict(state)
        advance(run, range(STOP, STEPS))
        endings[name] = ending(run)
    return endings


if __name__ == "__main__":
    torch.save(resume(torch.load(sys.argv[1], weights_only=True)), sys.argv[2])
