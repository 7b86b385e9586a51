"""parameter_ema against the golden values and explicit weighted means."""

import pytest
import torch
from helpers import (
    EPS,
    chain,
    close,
    e_start,
    examples,
    gradients,
    matches_golden,
    starts,
    walk,
    weighted_mean,
)
from hypothesis import given
from hypothesis import strategies as st

from heavyball import chainable as C


def means_after(
    begin: list[torch.Tensor], grads: list, beta: float, *before: object
) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """The averages and the parameters after every step."""
    means = []

    def remember(optimizer: torch.optim.Optimizer, t: int) -> None:
        if t > 1:
            with optimizer.averaged():
                means.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])

    last = [[None if g is None else torch.zeros_like(g) for g in grads[-1]]]
    path = walk(
        chain(*before, C.parameter_ema(beta=beta), lr=1.0), begin, [*grads, *last], remember
    )
    return means, path[:-1]


def test_the_golden_values() -> None:
    # p_t = 1, 2, 4 by gradient descent from 0 with lr 1
    grads = [[torch.tensor([g], dtype=torch.float64)] for g in (-1.0, -1.0, -2.0)]
    means, path = means_after([torch.zeros(1, dtype=torch.float64)], grads, 0.999, C.apply)
    assert [p.item() for (p,) in path] == [1.0, 2.0, 4.0]
    matches_golden([m for (m,) in means], "1 | 1.50025012506 | 2.33433388911")


@examples(20)
@given(beta=st.sampled_from([0.0, 0.5, 0.9, 0.999]), seed=st.integers(0, 99))
def test_it_is_the_weighted_mean_of_the_parameters_behind_each_step(beta: float, seed: int) -> None:
    means, path = means_after(starts(seed=seed), gradients(8, seed=seed), beta, C.sign)
    for t, step in enumerate(means, start=1):
        for which, mean in enumerate(step):
            past = [ps[which] for ps in path[:t]]
            # see test_exp_avg; parameters are below 15
            close(mean, weighted_mean(past, beta), atol=8 * EPS * 15 * (4 + 1 / (1 - beta)))


def test_the_first_mean_is_the_parameter_and_not_a_thousandth_of_it() -> None:
    means, path = means_after(starts(), gradients(1), 0.999, C.sign)
    for mean, p in zip(means[0], path[0], strict=True):
        assert torch.equal(mean, p)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_it_runs_after_the_write_wherever_it_stands(place: int) -> None:
    grads = gradients(4, [(2, 2)])
    elements = [C.exp_avg, C.sign]
    elements.insert(place, C.parameter_ema(beta=0.5))
    param = torch.nn.Parameter(e_start())
    optimizer = C.ChainOpt([param], 0.1, *elements)
    past = []
    for (g,) in grads:
        param.grad = g.clone()
        optimizer.step()
        past.append(param.detach().clone())
        mean = optimizer.state[param]["parameter_ema"]
        close(mean, weighted_mean(past, 0.5), atol=20 * EPS * 5)


def test_averaging_changes_neither_the_training_nor_the_weights_it_comes_back_to() -> None:
    begin, grads = starts(), gradients(6)
    plain = walk(chain(C.scale_by_adam), begin, grads)

    def look(optimizer: torch.optim.Optimizer, t: int) -> None:
        before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
        optimizer.eval()
        optimizer.eval()
        optimizer.train()
        for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
            assert torch.equal(p, old)

    averaged = walk(chain(C.scale_by_adam, C.parameter_ema), begin, grads, look)
    for one, other in zip(plain, averaged, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
