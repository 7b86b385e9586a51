"""Kernels for tensors that lie in another order than a kernel walks: against the eager path."""

import copy

import pytest
import torch
from helpers import made_plans

import heavyball

C = heavyball.chainable
SHAPE = (4, 6, 5, 3)


def values(shape: tuple, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def plain(x: torch.Tensor) -> torch.Tensor:
    return x


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 2).contiguous().transpose(0, 2)


def sliced(x: torch.Tensor) -> torch.Tensor:
    return torch.full((*x.shape[:-1], x.shape[-1] + 2), 9.0)[..., 1:-1].copy_(x)


def every_other(x: torch.Tensor) -> torch.Tensor:
    return torch.full((2 * x.shape[0], *x.shape[1:]), 9.0)[::2].copy_(x)


def sliced_and_transposed(x: torch.Tensor) -> torch.Tensor:
    return sliced(x.transpose(0, 3)).transpose(0, 3)


def negated(x: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(-x)


def imaginary(x: torch.Tensor) -> torch.Tensor:
    """A negated view that ordinary code can make."""
    return torch.complex(torch.zeros_like(x), -x).conj().imag


LAYOUTS = [plain, channels_last, transposed, sliced, every_other, sliced_and_transposed]
CHAINS = {
    "elementwise": (C.scale_by_adam,),
    "sums": (C.scale_by_adam, C.cautious, C.centralize),
    "over all": (C.clip_by_global_norm(max_norm=0.5), C.scale_by_adam),
    "rows": (C.centralize, C.exp_avg),
}


def train(chain, param, grad, compiled, steps: int = 4, shape: tuple = SHAPE, **options):
    p = torch.nn.Parameter(param(values(shape, 0)))
    q = torch.nn.Parameter(values((7,), 1))
    before = p.stride()
    opt = C.ChainOpt([p, q], 0.1, *chain, compile=compiled, **options)
    for step in range(steps):
        p.grad = grad(values(shape, 10 + step)).to(p.dtype)
        q.grad = values((7,), 20 + step)
        opt.step()
    assert p.stride() == before
    return p, q, opt


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("param", LAYOUTS)
def test_every_layout_has_a_kernel_with_the_eager_result(monkeypatch, chain: str, param) -> None:
    for grad in (*LAYOUTS, negated, imaginary):
        ends = [train(CHAINS[chain], param, grad, compiled)[:2] for compiled in (False, True)]
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_lies_between_the_elements_is_left_alone() -> None:
    whole = torch.full((6, 9), 9.0)
    p = torch.nn.Parameter(whole[::2, 1:5])
    opt = heavyball.AdamW([p], lr=0.1, compile=True)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    mask = torch.zeros_like(whole, dtype=torch.bool)
    mask[::2, 1:5] = True
    assert (whole[~mask] == 9).all()
    assert (whole[mask] < 9).all()


@pytest.mark.parametrize("param", [channels_last, sliced])
def test_rows_and_columns_of_any_layout(param) -> None:
    """The kernel for factored moments takes contiguous tensors: the others are copied to be so."""
    for shape in ((40, 36), (36, 40)):
        layout = transposed_matrix if param is channels_last else param
        chain = (C.factored_rms, C.exp_avg)
        ends = [train(chain, layout, plain, c, shape=shape)[:2] for c in (False, True)]
        for one, other in zip(*ends, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def transposed_matrix(x: torch.Tensor) -> torch.Tensor:
    return x.t().contiguous().t()


def test_a_copy_rounds_with_the_bits_of_the_eager_path() -> None:
    ends = []
    for compiled in (False, True):
        whole = values((8, 6, 5, 3), 0).to(torch.bfloat16)
        p = torch.nn.Parameter(whole.transpose(1, 2)[::2])
        opt = C.ChainOpt([p], 1e-3, C.sign, compile=compiled, seed=7)
        for _ in range(5):
            p.grad = torch.ones_like(p)
            opt.step()
        ends.append(p.detach().clone())
    assert torch.equal(*ends)


def test_state_in_another_order_is_brought_in_order_once() -> None:
    p, q, opt = train(CHAINS["elementwise"], plain, plain, True)
    saved = opt.state_dict()
    key = "scale_by_adam.exp_avg"
    saved["state"][0][key] = channels_last(saved["state"][0][key])
    ends = []
    for compiled in (False, True):
        a, b = copy.deepcopy(p), copy.deepcopy(q)
        other = C.ChainOpt([a, b], 0.1, C.scale_by_adam, compile=compiled)
        other.load_state_dict(saved)
        other.state[a][key] = channels_last(other.state[a][key])
        for step in range(3):
            a.grad, b.grad = values(SHAPE, step), values((7,), step)
            other.step()
        if compiled:
            assert other.state[a][key].is_contiguous()
        ends.append(a.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_the_tables_are_used_again_and_no_copy_outlives_the_step(monkeypatch) -> None:
    made = made_plans(monkeypatch)
    *_, opt = train(CHAINS["sums"], sliced, transposed, True, steps=6)
    assert len(made) == 1
    (copied,) = made[0].copies
    assert copied.copy is None
    assert copied.grad is None
    assert opt.plan().reordered


def test_a_gradient_of_another_layout_in_mid_training() -> None:
    ends = []
    for compiled in (False, True):
        p = torch.nn.Parameter(values(SHAPE, 0))
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, compile=compiled)
        for step in range(9):
            p.grad = (plain, channels_last, sliced)[step // 3](values(SHAPE, step))
            opt.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_an_axis_of_one_element_has_no_order() -> None:
    """Kernels of size 1 in a channels_last network: the same memory under other strides."""
    p = torch.nn.Parameter(values((8, 6, 1, 1), 0))
    opt = heavyball.AdamW([p], compile=True)
    p.grad = values((8, 6, 1, 1), 1).as_strided((8, 6, 1, 1), (6, 1, 6, 6))
    assert p.grad.stride() != p.stride()
    opt.step()
    assert not opt.plan().reordered


@C.transform()
def less_some(update):
    """Looks at a part of the tensor, which is neither all elements nor one for each along an axis."""
    return update - update[:2].mean() if update.ndim > 2 else update


@pytest.mark.filterwarnings("ignore:the chain .* runs without a compiled kernel")
def test_a_parameter_without_a_kernel_leaves_the_others_their_tables(monkeypatch) -> None:
    made = made_plans(monkeypatch)
    ends = []
    for compiled in (False, "auto"):
        params = [torch.nn.Parameter(values(s, 0)) for s in ((8, 8, 5, 3), (6, 7), (9,))]
        chain = (C.clip_by_global_norm(max_norm=0.5), C.factored_rms(min_dim=4), less_some)
        opt = C.ChainOpt(params, 0.1, *chain, compile=compiled)
        for step in range(5):
            for p in params:
                p.grad = values(tuple(p.shape), step)
            opt.step()
        ends.append(params)
    assert len(made) == 1
    plan = opt.plan()
    assert list(plan.reasons) == ["0"]
    assert "less_some" not in plan.reasons["0"]
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
