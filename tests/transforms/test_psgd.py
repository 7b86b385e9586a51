"""PSGD with Kronecker factors, against kron_torch, golden values and the definition."""

import itertools
import os
import random
import warnings
from typing import Any

import pytest
import torch
from helpers import (
    chain,
    grid,
    h_grads,
    m_start,
    of_one,
    parameters,
    snapshot,
    summary,
    train,
    walk,
)
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.linalg import device_memory as memory
from heavyball.linalg import kron, triangles
from heavyball.runtime import serve as whole

with pytest.MonkeyPatch.context() as patched:
    # kron_torch compiles its functions where it defines them
    patched.setitem(os.environ, "TORCHDYNAMO_DISABLE", "1")
    import kron_torch.kron as original

OPTIONS = {"preconditioner_update_probability": 1.0}


def wave(shape: tuple[int, ...], t: int) -> Tensor:
    """What stands in for noise: other numbers for every shape and step."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    return torch.cos(2 + 0.61 * (index + 5 * t) ** 2)


class Draws:
    """`noise` and `chance` for direct calls of a transform."""

    def __init__(self, seed: int = 0):
        self._made = torch.Generator().manual_seed(seed)
        self._host = random.Random(seed)

    def __call__(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self._made)

    def bits(self, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        return torch.randint(0, 1 << 16, shape, dtype=torch.int32, generator=self._made)

    def chance(self, salt: int = 0) -> float:
        return self._host.random()


@pytest.fixture
def no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same waves for kron_torch and for our optimizer."""

    def ours(self: Any, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        count = self._group[0].count
        return wave(shape[1:], count - 1).expand(shape)

    calls: dict[tuple[int, ...], int] = {}

    def theirs(like: Tensor) -> Tensor:
        calls[like.shape] = calls.get(like.shape, -1) + 1
        return wave(like.shape, calls[like.shape]).to(like.dtype)

    monkeypatch.setattr(whole.Noise, "__call__", ours)
    monkeypatch.setattr(original.torch, "randn_like", theirs)


# ---- golden values and the original


def test_golden_values_of_the_whole_optimizer(
    no_noise: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def golden_noise(self: Any, shape: tuple[int, ...], salt: int = 0) -> Tensor:
        return torch.cos(2 + 0.61 * (grid(8, 6, 6) + 5 * (self._group[0].count - 1)) ** 2)[None]

    monkeypatch.setattr(whole.Noise, "__call__", golden_noise)
    golden = [
        (0.8336224961, 0.8452416391, -0.777272653, 1.006363761, 24.18165577),
        (0.827901109, 0.8466924597, -0.7783854624, 0.9033037064, 24.21002217),
        (0.8280272118, 0.843534284, -0.7829157607, 0.7854823902, 24.22206974),
    ]
    make = lambda params: heavyball.PSGDKron(  # noqa: E731
        params, 0.01, preconditioner_update_probability=1.0
    )
    path = walk(make, [m_start()], of_one(h_grads(3)))
    for (param,), expected in zip(path, golden, strict=True):
        torch.testing.assert_close(
            summary(param), torch.tensor(expected, dtype=torch.float64), rtol=6e-10, atol=6e-11
        )


ORIGINALS = {
    "matrix": ((5, 4), {}),
    "one_diag": ((5, 4), {"memory_save_mode": "one_diag"}),
    "smart_one_diag": ((4, 5), {"memory_save_mode": "smart_one_diag"}),
    "all_diag": ((4, 5), {"memory_save_mode": "all_diag"}),
    "vector": ((6,), {}),
    "triangular vector": ((6,), {"min_ndim_triangular": 1}),
    "one column": ((6, 1), {}),
    "long": ((7, 3), {"max_size_triangular": 4}),
    "cube": ((3, 2, 4), {}),
    "merged": ((2, 3, 4), {"merge_dims": True}),
    "five": ((2, 3, 1, 2, 2), {}),
    "scaled": ((3, 2, 2), {"precond_init_scale": 0.3, "precond_lr": 0.3}),
}


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("momentum", [True, False])
def test_steps_are_those_of_the_original(no_noise: None, name: str, momentum: bool) -> None:
    shape, options = ORIGINALS[name]
    options = {"merge_dims": False, **options, "momentum_into_precond_update": momentum}
    made = torch.Generator().manual_seed(3)
    start = torch.randn(shape, dtype=torch.float64, generator=made)
    grads = [torch.randn(shape, dtype=torch.float64, generator=made) for _ in range(8)]

    def theirs(params: list[Tensor]) -> torch.optim.Optimizer:
        update = {"preconditioner_update_probability": 1.0, "max_size_triangular": 2048}
        return original.Kron(
            params, 0.01, b1=0.9, precond_dtype=torch.float64, **{**update, **options}
        )

    def ours(params: list[Tensor]) -> torch.optim.Optimizer:
        return heavyball.PSGDKron(params, 0.01, preconditioner_update_probability=1.0, **options)

    expected, found = (walk(make, [start], of_one(grads)) for make in (theirs, ours))
    # its solves are in float32, and where it fits the momentum its noise reaches the update
    bound = 2e-5 if momentum else 1e-6
    for (a,), (b,) in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound)
    assert (found[-1][0] - start).abs().max() > 0.005


def test_deterministic_steps_are_those_of_the_original(no_noise: None) -> None:
    made = torch.Generator().manual_seed(3)
    start, *grads = torch.randn(14, 5, 4, dtype=torch.float64, generator=made)
    # 0.4: at every third step, and at the steps between nothing is drawn
    waves = iter(wave((5, 4), t) for t in (2, 5, 8, 11))

    def theirs(params: list[Tensor]) -> torch.optim.Optimizer:
        return original.Kron(
            params,
            0.01,
            preconditioner_update_probability=0.4,
            momentum_into_precond_update=False,
            precond_dtype=torch.float64,
        )

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(original.torch, "randn_like", lambda like: next(waves))
        expected = walk(theirs, [start], of_one(grads))
    found = walk(
        lambda params: heavyball.PSGDKron(
            params,
            0.01,
            preconditioner_update_probability=0.4,
            momentum_into_precond_update=False,
            stochastic_schedule="deterministic",
        ),
        [start],
        of_one(grads),
    )
    for (a,), (b,) in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ---- the definition


def call(
    update: Tensor, factors: Any, squares: Any = None, *, count: int = 1, **options: Any
) -> tuple[Tensor, tuple[Tensor, ...], Any]:
    """The transform on a batch, with random numbers of its own."""
    draws = Draws(count)
    options = {**OPTIONS, **options}
    result = C.psgd_kron(**options)
    return result.update(
        update,
        factors,
        squares,
        grad=update,
        count=count,
        noise=draws,
        chance=draws.chance,
        **{"precond_lr": 0.1, **result.options},
    )


def begin(shape: tuple[int, ...], **options: Any) -> tuple[Any, Any]:
    """The first factors (and squares) of one parameter, as a batch."""
    made = C.psgd_kron(**{**OPTIONS, **options})
    param = torch.zeros(shape, dtype=torch.float64)
    found = []
    for state in made.states.values():
        wanted = state.needed_by is None or made.options[state.needed_by]
        tensors = state.init(param, made.options) if wanted else None
        found.append(tensors and tuple(t[None].to(torch.float64) for t in tensors))
    return found[0], found[1]


def full(factors: Any, shape: tuple[int, ...]) -> list[Tensor]:
    """Lines opened to triangles, by their sizes."""
    found = []
    for q, size in zip(factors, shape, strict=True):
        line = q.ndim == 2 and q.shape[-1] != size
        found.append(triangles.from_line(q) if line else q)
    return found


def inputs(shape: tuple[int, ...], steps: int = 4) -> list[Tensor]:
    made = torch.Generator().manual_seed(8)
    return [torch.randn(1, *shape, dtype=torch.float64, generator=made) for _ in range(steps)]


@pytest.mark.parametrize("line", [True, False])
@pytest.mark.parametrize("delayed", [True, False])
def test_update_is_p_times_what_came_in(line: bool, delayed: bool) -> None:
    """Bit for bit: no noise in it, and the factors of before the fit only if that was asked for."""
    options = {"store_triu_as_line": line, "delayed": delayed}
    shape = (5, 4)
    factors, _ = begin(shape, **options)
    for t, x in enumerate(inputs(shape), start=1):
        kept = x.clone()
        out, new, _ = call(x, factors, count=t, **options)
        used = full(factors if delayed else new, shape)
        assert torch.equal(out, kron.precondition(x, used))
        assert torch.equal(x, kept)
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(new, factors, strict=True))
        factors = new


@pytest.mark.parametrize("delayed", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (6,), (2, 3, 4)])
def test_cached_is_the_same_but_for_rounding(shape: tuple[int, ...], delayed: bool) -> None:
    plain, _ = begin(shape, delayed=delayed)
    factors, squares = begin(shape, delayed=delayed, cached=True)
    for t, x in enumerate(inputs(shape), start=1):
        chance = {"preconditioner_update_probability": float(t != 3), "delayed": delayed}
        a, plain, none = call(x, plain, count=t, **chance)
        b, factors, squares = call(x, factors, squares, count=t, cached=True, **chance)
        assert none is None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        for square, q in zip(squares, kron.squares(full(factors, shape)), strict=True):
            assert torch.equal(square, q)


def largest_of(factors: Any, shape: tuple[int, ...]) -> list[float]:
    return [q.abs().max().item() for q in full(factors, shape)]


@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2)])
@pytest.mark.parametrize("line", [True, False])
@pytest.mark.parametrize("chance", [0.005, 0.5])
def test_factors_are_balanced_at_one_fit_in_a_hundred(
    shape: tuple[int, ...], line: bool, chance: float
) -> None:
    options = {"preconditioner_update_probability": 1.0, "store_triu_as_line": line}
    made = C.psgd_kron(**{**OPTIONS, **options})
    uneven = [10.0**k * q for k, q in enumerate(begin(shape, **options)[0])]
    (x,) = inputs(shape, 1)
    # too small a step to be seen in an entry
    given = {**made.options, "precond_lr": 1e-30, "grad": x, "count": 1, "noise": Draws()}
    _, new, _ = made.update(x, tuple(uneven), None, chance=lambda salt=0: chance, **given)
    sizes = largest_of(new, shape)
    even = 10 ** (sum(range(len(shape))) / len(shape))
    expected = [even] * len(shape) if chance < 0.01 else [10.0**k for k in range(len(shape))]
    assert sizes == pytest.approx(expected, rel=1e-12)


def test_a_step_without_a_fit_keeps_the_factors() -> None:
    factors, _ = begin((5, 4))
    x = inputs((5, 4))[0]
    _, factors, _ = call(x, factors)
    out, same, _ = call(x, factors, count=2, preconditioner_update_probability=0.0)
    assert all(torch.equal(a, b) for a, b in zip(same, factors, strict=True))
    assert torch.equal(out, kron.precondition(x, full(factors, (5, 4))))


def test_function_is_given_the_number_of_steps_before() -> None:
    seen: list[int] = []

    def probability(n: int) -> float:
        seen.append(n)
        return 1.0

    opt = heavyball.PSGDKron(parameters((4, 3)), preconditioner_update_probability=probability)
    train(opt, range(3))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("schedule", [True, False, "deterministic"])
def test_every_parameter_is_fitted_at_the_same_steps(schedule: Any) -> None:
    opt = heavyball.PSGDKron(
        parameters((4, 3), (5,), (2, 2, 3), (4, 3)),
        preconditioner_update_probability=0.4,
        stochastic_schedule=schedule,
    )
    fits = []
    before: dict[str, Tensor] = {}
    for seed in range(25):
        train(opt, [seed])
        now = {k: v for k, v in snapshot(opt).items() if ".factors." in k}
        changed = {k[0] for k in now if k in before and not torch.equal(now[k], before[k])}
        fits.append(changed)
        before = now
    assert all(changed in (set(), {"0", "1", "2", "3"}) for changed in fits)
    assert 5 <= sum(map(bool, fits)) <= 15


def test_split_blocks_are_parameters_of_their_own(no_noise: None) -> None:
    grads = [
        torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        for t in range(4)
    ]
    start = torch.zeros(5, 7, dtype=torch.float64)
    psgd = C.psgd_kron(max_size_triangular=4, split=True, **OPTIONS)
    whole_path = walk(chain(psgd), [start], of_one(grads))
    cut = [(slice(a, a + 4), slice(b, b + 4)) for a, b in itertools.product((0, 4), repeat=2)]
    parts = walk(
        chain(C.psgd_kron(**OPTIONS)),
        [start[at] for at in cut],
        [[g[at] for at in cut] for g in grads],
    )
    for (found,), blocks in zip(whole_path, parts, strict=True):
        for at, block in zip(cut, blocks, strict=True):
            torch.testing.assert_close(found[at], block, rtol=1e-12, atol=1e-14)


def test_merging_works_on_the_more_square_matrix(no_noise: None) -> None:
    grads = [
        torch.randn(3, 2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        for t in range(3)
    ]
    start = torch.zeros(3, 2, 2, 5, dtype=torch.float64)
    found = walk(chain(C.psgd_kron(merge_dims=True, **OPTIONS)), [start], of_one(grads))
    flat = [g.reshape(12, 5) for g in grads]
    expected = walk(chain(C.psgd_kron(**OPTIONS)), [start.reshape(12, 5)], of_one(flat))
    for (a,), (b,) in zip(found, expected, strict=True):
        torch.testing.assert_close(a.reshape(12, 5), b, rtol=1e-12, atol=1e-14)


# ---- what is stored


def test_state_is_as_small_as_the_options_say() -> None:
    cases = {
        (): [(6, 5), 21 + 15],
        ("store_triu_as_line", False): [(6, 5), 36 + 25],
        ("max_size_triangular", 5): [(6, 5), 6 + 15],
        ("memory_save_mode", "one_triu"): [(6, 5), 6 + 15],
        ("memory_save_mode", "all_diag"): [(6, 5), 6 + 5],
        ("cached", True): [(6, 5), 21 + 15 + 36 + 25],
        ("min_ndim_triangular", 1): [(6,), 21],
        ("merge_dims", True): [(2, 3, 5), 21 + 15],
    }
    for option, (shape, expected) in cases.items():
        options = {option[0]: option[1]} if option else {}
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            opt = C.ChainOpt(parameters(shape), 0.1, C.psgd_kron(q_dtype=dtype, **options))
            train(opt, [0])
            assert opt.state_bytes() - 8 == expected * size, (option, dtype)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PSGDKron", {}),
        ("PSGDKron", {"store_triu_as_line": False, "cached": True}),
        ("PSGDKron", {"q_dtype": "bfloat16", "merge_dims": True}),
        ("PSGDKron", {"split": True, "max_size_triangular": 3, "cached": True}),
        ("PSGDPRO", {"memory_save_mode": "one_diag"}),
        ("PSGDLRA", {"rank": 3}),
        ("Shampoo", {"max_precond_dim": 4}),
    ],
    ids=str,
)
def test_the_plan_of_the_memory_is_exact(name: str, options: dict[str, Any]) -> None:
    shapes = (4, 3), (4,), (2, 3, 2), (), (6, 5, 1, 2, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        opt = heavyball.PRESETS[name](parameters(*shapes, dtype=dtype), **options)
        train(opt, [0])
        plan = heavyball.memory_plan(parameters(*shapes, dtype=dtype), name, **options)
        assert plan.state_bytes == opt.state_bytes()


def test_bfloat16_factors_are_rounded_without_bias() -> None:
    """Changes of a fiftieth of a rounding step add up over many fits."""
    start = parameters((64, 64))[0].detach()
    options = {**OPTIONS, "precond_lr": 1e-4, "precond_init_scale": 9}
    drifts = []
    for dtype in ("float32", "bfloat16"):
        param = torch.nn.Parameter(start.clone())
        opt = C.ChainOpt([param], 0.0, C.psgd_kron(q_dtype=dtype, **options))
        train(opt, range(80))
        factors = [opt.state[param][f"psgd_kron.factors.{i}"] for i in range(2)]
        assert {q.dtype for q in factors} == {getattr(torch, dtype)}
        opened = [triangles.from_line(q[None].float()) for q in factors]
        drifts.append([float(q.diagonal(0, 1, 2).mean() - 3) for q in opened])
    # bfloat16 has steps of 0.0156 at 3, so rounding to nearest would keep 3 at every one of the fits
    for exact, rounded in zip(*drifts, strict=True):
        assert 0.002 < -exact < 80 * 0.0156 / 20
        assert abs(rounded - exact) < 0.5 * abs(exact)


@pytest.mark.parametrize("store", [True, False])
def test_line_and_square_are_the_same_bits(store: bool) -> None:
    paths = []
    for line in (store, not store):
        params = parameters((6, 5), (3, 2, 4))
        opt = heavyball.PSGDKron(params, 0.01, store_triu_as_line=line)
        train(opt, range(4))
        paths.append([p.detach().clone() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*paths, strict=True))


# ---- shapes, safety, noise

SHAPES = [
    *((40, 30), (8, 3, 5), (8, 4, 3, 3), (4, 3, 2, 2, 2), (3000, 4), (9,), (), (1, 7)),
    *((7, 1), (3, 6, 5)),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_shapes_and_dtypes_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    params = parameters(shape, dtype=dtype)
    before = params[0].detach().clone()
    opt = heavyball.PSGDKron(params, 0.01)
    train(opt, range(3))
    moved = (params[0].detach() - before).double()
    assert moved.isfinite().all()
    # three steps of at most 1.1 in root mean square, and the rounding of bfloat16
    assert 0.003 < moved.square().mean().sqrt() < 0.034 + 3 * (dtype == torch.bfloat16) * 0.02


@pytest.mark.parametrize("preset", ["PSGDKron", "PSGDPRO", "PSGDLRA", "Shampoo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hard_gradients_leave_everything_finite(preset: str, dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 12, 12, dtype=torch.float64, generator=made)
    u, v = (torch.linalg.qr(m).Q for m in (left, right))
    hard = [
        torch.zeros(12, 12, dtype=torch.float64),
        torch.outer(left[0], right[0]),
        u * torch.logspace(-12, 0, 12, dtype=torch.float64) @ v,
        1e25 * left,
        1e-25 * left,
    ]
    for grad in hard:
        params = [torch.nn.Parameter(left.to(dtype))]
        opt = heavyball.PRESETS[preset](params, 0.01)
        for _ in range(25):
            params[0].grad = grad.to(dtype)
            opt.step()
        values = [params[0].detach(), *opt.state[params[0]].values()]
        assert all(value.isfinite().all() for value in values)


def test_zero_gradients_change_no_factor() -> None:
    params = parameters((4, 3))
    opt = C.ChainOpt(params, 0.1, C.psgd_kron(**OPTIONS))
    before = params[0].detach().clone()
    for _ in range(3):
        params[0].grad = torch.zeros(4, 3)
        opt.step()
    assert torch.equal(params[0], before)
    lines = [opt.state[params[0]][f"psgd_kron.factors.{i}"][None] for i in range(2)]
    assert all(
        torch.equal(triangles.from_line(q)[0], torch.eye(q_n))
        for q, q_n in zip(lines, (4, 3), strict=True)
    )


def test_bad_gradient_does_not_spoil_the_factors() -> None:
    params = parameters((4, 3))
    opt = C.ChainOpt(params, 0.1, C.psgd_kron(**OPTIONS))
    train(opt, range(2))
    before = snapshot(opt)
    params[0].grad = torch.full((4, 3), torch.nan)
    opt.step()
    after = snapshot(opt)
    for key in before:
        if ".factors." in key:
            assert torch.equal(before[key], after[key])


def test_noise_is_the_optimizers_own() -> None:
    def run(seed: int) -> list[Tensor]:
        params = parameters((6, 5), (6, 5))
        train(heavyball.PSGDKron(params, 0.01, seed=seed), range(4))
        return [p.detach().clone() for p in params]

    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = run(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_factor_too_large_for_the_memory_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 4000 if device.type == "cpu" else None)
    params = parameters((20, 20), (2, 2))
    opt = C.ChainOpt(params, 0.1, C.psgd_kron)
    with pytest.warns(UserWarning, match=r"\(20, 20\).*max_size_triangular") as caught:
        train(opt, [0])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(C.ChainOpt(parameters((20, 20)), 0.1, C.psgd_kron(memory_save_mode="all_diag")), [0])


def test_memory_of_this_machine_is_known() -> None:
    found = memory.memory_of(torch.device("cpu"))
    assert found is not None
    assert 2**28 < found < 2**50
    assert memory.memory_of(torch.device("meta")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preconditioner_update_probability": 1.5}, "1.5"),
        ({"max_size_triangular": -1}, "max_size_triangular=-1"),
        ({"memory_save_mode": "some"}, "one_diag"),
        ({"q_dtype": "float16"}, "bfloat16"),
        ({"precond_lr": 0.0}, "precond_lr"),
        ({"precond_init_scale": 0}, "precond_init_scale=0"),
        ({"decision": "never"}, "deterministic"),
    ],
)
def test_wrong_options_raise_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        C.ChainOpt(parameters((4, 3)), 0.1, C.psgd_kron(**options))
