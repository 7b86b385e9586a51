"""descend against torch.optim.SGD without momentum, and the closed form of a constant gradient."""

import torch
from helpers import EPS, chain, close, gradients, same_path, set_lr, starts, walk

from heavyball import chainable as C

RATES = [0.1, 0.2, 0.05, 0.0, 1.0]


def test_it_is_torch_sgd() -> None:
    begin, grads = starts(), gradients(5)
    ours = walk(chain(C.descend), begin, grads, set_lr(RATES))
    theirs = walk(lambda ps: torch.optim.SGD(ps, 0.1), begin, grads, set_lr(RATES))
    # two roundings per step of numbers below 15
    same_path(ours, theirs, atol=5 * 2 * EPS * 15)


def test_the_default_write_is_descend() -> None:
    begin, grads = starts(), gradients(5)
    same_path(
        walk(chain(C.exp_avg), begin, grads), walk(chain(C.exp_avg, C.descend), begin, grads), 0.0
    )


def test_the_lr_is_the_slope_and_warms_up_from_the_first_step() -> None:
    begin = starts()
    one = [[torch.ones_like(p) for p in begin]] * 6
    path = walk(chain(C.descend, lr=0.2, warmup_steps=4), begin, one)
    for t, step in enumerate(path, start=1):
        gone = 0.2 * sum(min(1, i / 4) for i in range(1, t + 1))
        for p, p0 in zip(step, begin, strict=True):
            close(p, p0 - gone, atol=6 * 4 * EPS * 5)
