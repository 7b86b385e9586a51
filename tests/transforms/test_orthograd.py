"""orthograd against the golden values, pytorch_optimizer, and the geometry that it promises."""

import pytest
import torch
from helpers import (
    EPS,
    bound,
    chain,
    close,
    examples,
    golden_path,
    gradients,
    m_grads,
    m_start,
    matches_golden,
    moves,
    of_one,
    reveal,
    same_path,
    starts,
    summary,
    updates,
    walk,
)
from hypothesis import given
from hypothesis import strategies as st
from pytorch_optimizer import OrthoGrad

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.orthograd), 3),
        """[0.8603761745, -1.961711174, 3.034288807, 4.028333764]
        | [0.7649144645, -1.903906291, 3.138063641, 3.998705298]
        | [0.6801293433, -1.819037911, 3.055497385, 4.120127843]""",
    )
    matrix = walk(chain(C.orthograd), [m_start()], of_one(m_grads(3)))
    matches_golden(
        [summary(p) for (p,) in matrix],
        """(0.7884794583, 0.8934512337, -0.7050545632, 1.272748973, 24.38014123)
        | (0.6980628682, 0.984796987, -0.7996095453, 1.183571759, 24.62409038)
        | (0.6122227901, 1.056544759, -0.7026295767, 1.194746777, 24.87816497)""",
        # sums of 48 numbers below 1
        roundings=48 * 1e-15,
    )


def test_it_is_pytorch_optimizers_around_sgd() -> None:
    shapes = [(5,), (3, 4), (2, 3, 2, 2)]
    begin, grads = starts(shapes), gradients(10, shapes)
    ours = walk(chain(C.orthograd, C.heavyball_momentum), begin, grads)
    theirs = walk(
        lambda ps: OrthoGrad(torch.optim.SGD(ps, 0.1, momentum=0.9), foreach=False), begin, grads
    )
    assert moves(ours, begin)
    # The projection depends on the weights, with a slope up to 2 ||g|| / ||w|| < 10 per unit of lr,
    # summed by the momentum; lengths of 0.1 * 15 per step double the weights instead of errors.
    same_path(ours, theirs, atol=100 * bound(10, update=100, param=100))


@examples(40)
@given(
    shape=st.sampled_from([(2,), (7,), (3, 4), (2, 3, 2, 2)]),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_the_result_is_orthogonal_to_the_weights_and_as_long_as_the_gradient(
    shape: tuple[int, ...], seed: int, scale: float
) -> None:
    (w,) = starts([shape], seed)
    (((grad,),)) = gradients(1, [shape], seed)
    grad = grad * scale
    (ours,) = updates([C.orthograd], [grad], w)
    size = grad.square().sum().sqrt()
    close(ours.square().sum().sqrt(), size, rtol=60 * EPS, atol=0.0)
    rest = grad - (w * grad).sum() / (w * w).sum() * w
    # rounding leaves 30 units of ||g|| along w in what is left, and the rescaling magnifies them
    magnified = 60 * EPS * size * (size / rest.square().sum().sqrt())
    assert ((w * ours).sum().abs() <= magnified * w.square().sum().sqrt()).item()
    assert (ours * grad).sum() > 0


def test_what_is_parallel_to_the_weights_gives_zero_not_noise() -> None:
    (w,) = starts([(6, 5)])
    for factor in (3.0, -0.1, 1e-20, 1e20):
        (ours,) = updates([C.orthograd], [factor * w], w)
        assert torch.equal(ours, torch.zeros_like(w))
    low = w.to(torch.float32)
    assert torch.equal(updates([C.orthograd], [0.7 * low], low)[0], torch.zeros_like(low))


def test_zero_weights_pass_the_gradient_and_a_zero_gradient_stays_zero() -> None:
    ((grad,),) = gradients(1, [(3, 4)])
    zero = torch.zeros(3, 4, dtype=torch.float64)
    close(updates([C.orthograd], [grad], zero)[0], grad, rtol=4 * EPS, atol=0.0)
    assert torch.equal(updates([C.orthograd], [zero], grad)[0], zero)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_element_gives_zero_or_passes(shape: tuple[int, ...]) -> None:
    grad = torch.full(shape, 2.5, dtype=torch.float64)
    for start in (torch.zeros_like(grad), torch.full_like(grad, 0.3)):
        assert torch.equal(updates([C.orthograd], [grad], start)[0], torch.zeros_like(grad))
        passing = C.orthograd(single_element="passthrough")
        assert torch.equal(updates([passing], [grad], start)[0], grad)


def test_bf16_weights_are_promoted() -> None:
    made = torch.Generator().manual_seed(0)
    w = torch.randn(40, 30, generator=made).bfloat16()
    grad = torch.randn(40, 30, generator=made).bfloat16()
    param = torch.nn.Parameter(w.clone())
    optimizer = C.ChainOpt([param], 0.1, C.orthograd, reveal)
    param.grad = grad.clone()
    optimizer.step()
    ours = optimizer.state[param]["reveal"]
    (exact,) = updates([C.orthograd], [grad.double()], w.double())
    assert ours.dtype == torch.float32
    # a few float32 roundings of numbers below 5, where bf16 would leave 2^-9
    close(ours.double(), exact, atol=20 * 2**-24 * 5)
