"""mars against the golden values, pytorch_optimizer, and its own formula."""

import pytest
import torch
from helpers import (
    EPS,
    bound,
    chain,
    close,
    e_start,
    golden_path,
    gradients,
    matches_golden,
    moves,
    same_path,
    starts,
    updates,
    walk,
)
from pytorch_optimizer import MARS

from heavyball import chainable as C


def test_the_golden_values() -> None:
    matches_golden(
        golden_path(chain(C.mars, C.scale_by_adam(betas=(0.95, 0.99))), 3),
        """[0.9000000017, -2.099999979, 3.099999998, 4.099999998]
        | [0.8029682008, -2.034300185, 3.165002118, 4.085825155]
        | [0.7074174895, -1.956643974, 3.157152833, 4.11104641]""",
    )


@pytest.mark.parametrize("gamma", [0.025, 0.5, 0.0])
@pytest.mark.parametrize("betas", [(0.95, 0.99), (0.5, 0.9)])
def test_mars_adamw_is_pytorch_optimizers(betas: tuple[float, float], gamma: float) -> None:
    begin, grads = starts(), gradients(12, least=1.0)
    elements = (
        C.mars(gamma=gamma, beta1=betas[0]),
        C.scale_by_adam(betas=betas, eps_placement="biased"),
    )
    ours = walk(chain(*elements, weight_decay=0.1), begin, grads)
    theirs = walk(
        lambda ps: MARS(ps, 0.1, betas, gamma, weight_decay=0.1, optimize_1d=True, foreach=False),
        begin,
        grads,
    )
    assert moves(ours, begin)
    # that package adds 1e-15 to the biased v. Clipped to the norm 1, a gradient of 24 entries still
    # has entries above 0.01: v > 0.01 * 1e-4 at least, of which 1e-15 is 1e-9, half in the root
    same_path(ours, theirs, atol=bound(12, beta=max(betas)) + 12 * 0.1 * 10 * 0.5e-9)


def test_mars_lion_is_pytorch_optimizers() -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.mars(beta1=0.95), C.exp_avg(beta=0.95), C.sign), begin, grads)
    theirs = walk(
        lambda ps: MARS(ps, 0.1, mars_type="lion", optimize_1d=True, foreach=False), begin, grads
    )
    same_path(ours, theirs, atol=bound(12, update=1.0))


@pytest.mark.parametrize("max_norm", [None, 1.0, 4.0])
def test_it_is_the_gradient_plus_its_change_shortened_to_the_norm(max_norm: float | None) -> None:
    grads = [g for (g,) in gradients(8, [(3, 4)])]
    ours = updates([C.mars(gamma=0.1, beta1=0.8, max_norm=max_norm)], grads)
    clipped = 0
    for t, update in enumerate(ours):
        last = torch.zeros(3, 4, dtype=torch.float64) if t == 0 else grads[t - 1]
        # gamma beta1 / (1 - beta1) = 0.4
        expected = 1.4 * grads[t] - 0.4 * last
        size = expected.square().sum().sqrt()
        if max_norm is not None and size > max_norm:
            expected, clipped = expected * max_norm / size, clipped + 1
        close(update, expected, atol=20 * EPS * 20)
    assert clipped == {None: 0, 1.0: 8, 4.0: clipped}[max_norm]
    assert max_norm != 4.0 or 0 < clipped < 8


def test_a_correction_of_norm_below_one_is_not_stretched_and_zero_stays_zero() -> None:
    small = torch.full((4,), 0.01, dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)
    ours = updates([C.mars(gamma=0.1, beta1=0.8)], [small, small, zero, zero])
    close(ours[0], 1.4 * small, atol=4 * EPS)
    close(ours[1], small, atol=4 * EPS)
    close(ours[2], -0.4 * small, atol=4 * EPS)
    assert torch.equal(ours[3], zero)


def test_the_last_gradient_is_a_copy_that_zero_grad_does_not_reach() -> None:
    grads = [g for (g,) in gradients(3, [(2, 2)])]
    param = torch.nn.Parameter(e_start())
    optimizer = C.ChainOpt([param], 0.1, C.mars)
    param.grad = torch.zeros_like(param)
    path = []
    for g in grads:
        param.grad.copy_(g)
        optimizer.step()
        assert torch.equal(optimizer.state[param]["mars.last_grad"], g)
        optimizer.zero_grad(set_to_none=False)
        path.append([param.detach().clone()])
    same_path(path, walk(chain(C.mars), [e_start()], [[g] for g in grads]), atol=0.0)
