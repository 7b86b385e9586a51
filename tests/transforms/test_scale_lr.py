"""scale_lr: a part of the parameters with a learning rate of its own."""

import torch
from helpers import chain, close, gradients, same_path, starts, walk

from heavyball import chainable as C


def test_it_is_the_same_chain_in_a_group_with_that_lr_under_warm_up_and_decay() -> None:
    shapes = [(3, 4), (5,)]
    begin, grads = starts(shapes), gradients(6, shapes)
    elements = (C.scale_by_adam, C.scale_lr(factor=0.25))
    options = {"weight_decay": 0.1, "warmup_steps": 3}
    ours = walk(chain(*elements, lr=0.4, **options), begin, grads)
    theirs = walk(chain(C.scale_by_adam, lr=0.1, **options), begin, grads)
    same_path(ours, theirs, atol=1e-15)


def test_the_factor_is_live_and_follows_the_groups_lr() -> None:
    param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    opt = C.ChainOpt([param], 1.0, C.sign, C.scale_lr(factor=0.5))
    expected = 0.0
    for lr, factor in ((1.0, 0.5), (0.1, 0.5), (0.1, 3.0)):
        opt.param_groups[0].update(lr=lr, factor=factor)
        param.grad = torch.ones(1, dtype=torch.float64)
        opt.step()
        expected -= lr * factor
    close(param.detach(), torch.tensor([expected], dtype=torch.float64), atol=1e-15)
