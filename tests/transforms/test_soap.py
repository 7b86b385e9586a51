"""SOAP against golden values, pytorch_optimizer, and a dense formulation of its own."""

import itertools
import warnings
from typing import Any

import pytest
import pytorch_optimizer
import torch
from helpers import parameters, snapshot
from torch import Tensor

import heavyball
from heavyball import chainable as C
from heavyball.linalg import basis as B
from heavyball.linalg import eigenbasis as E

F64 = torch.float64


def square_gradient(step: int) -> Tensor:
    k = torch.arange(36, dtype=F64).reshape(6, 6)
    return torch.sin(1 + 0.37 * (k + 7 * (step - 1)) ** 2)


def square_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.sin(1 + torch.arange(36, dtype=F64).reshape(6, 6)))


def normal(shape: tuple, seed: int, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def run(opt: torch.optim.Optimizer, p: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    found = []
    for gradient in gradients:
        p.grad = gradient.to(p.dtype)
        opt.step()
        found.append(p.detach().clone())
    return found


# ---- golden values: entries [0, 0], [3, 2], [5, 5], the sum and the sum of squares after steps 2..6

GOLDEN = {
    1: [
        (0.8396532521, 0.8333524475, -0.9926358834, 0.5155543669, 18.45678581),
        (0.8405360725, 0.8301195709, -0.9916440078, 0.493075725, 18.46089845),
        (0.8408298096, 0.8278426485, -0.989725541, 0.4697787011, 18.46708049),
        (0.8408213286, 0.8270361273, -0.988205504, 0.4442989133, 18.47460574),
        (0.8399507916, 0.8253080646, -0.9864906524, 0.4181329088, 18.48214711),
    ],
    2: [
        (0.8396532521, 0.8333524475, -0.9926358834, 0.5155543669, 18.45678581),
        (0.8402186576, 0.8306566411, -0.9919329007, 0.4902452558, 18.46081097),
        (0.8390740129, 0.828050591, -0.9908220529, 0.4604964438, 18.46053353),
        (0.8376111557, 0.826760266, -0.9896526556, 0.4297568783, 18.45581213),
        (0.8360986134, 0.8249232641, -0.9880201481, 0.4012078697, 18.45299914),
    ],
}


@pytest.mark.parametrize("frequency", [1, 2])
def test_golden_values(frequency: int) -> None:
    p = square_parameter()
    start = p.detach().clone()
    opt = C.ChainOpt([p], 3e-3, C.soap_precond(precondition_frequency=frequency))
    found = run(opt, p, [square_gradient(t) for t in range(1, 7)])
    assert torch.equal(found[0], start)
    for value, expected in zip(found[1:], GOLDEN[frequency], strict=True):
        shown = (value[0, 0], value[3, 2], value[5, 5], value.sum(), value.square().sum())
        for one, other in zip(shown, expected, strict=True):
            # ten digits were printed
            assert abs(float(one) - other) < 6e-10 * max(1.0, abs(other))


# ---- pytorch_optimizer, which keeps m in the original basis and does its QR in float32


@pytest.mark.parametrize("shape", [(6, 6), (5, 5, 5), (4, 4, 4, 4)])
@pytest.mark.parametrize("frequency", [1, 3])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_pytorch_optimizer_agrees_on_tensors_of_full_rank(
    shape: tuple, frequency: int, correct_bias: bool
) -> None:
    gradients = [normal(shape, seed) for seed in range(8)]
    arguments = {
        "betas": (0.9, 0.95),
        "precondition_frequency": frequency,
        "correct_bias": correct_bias,
        "weight_decay": 0.0,
    }
    ours, theirs = (torch.nn.Parameter(normal(shape, 99)) for _ in range(2))
    opt = heavyball.SOAP([ours], 3e-3, merge_dims=False, **arguments)
    reference = pytorch_optimizer.SOAP([theirs], 3e-3, shampoo_beta=0.95, **arguments)
    for one, other in zip(
        run(opt, ours, gradients), run(reference, theirs, gradients), strict=True
    ):
        # their bases are float32: an angle of 1e-6 times the step, times the condition of the gaps
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)
    assert (ours - normal(shape, 99)).abs().max() > 1e-3


def test_pytorch_optimizer_agrees_on_what_has_no_basis() -> None:
    gradients = [normal((7,), seed) for seed in range(6)]
    ours, theirs = (torch.nn.Parameter(normal((7,), 99)) for _ in range(2))
    opt = heavyball.SOAP([ours], 3e-3, weight_decay=0.0)
    reference = pytorch_optimizer.SOAP([theirs], 3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for one, other in zip(
        run(opt, ours, gradients), run(reference, theirs, gradients), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


# ---- a dense formulation: one orthogonal matrix on the flattened tensor, no unfoldings


def kron(bases: list[Tensor]) -> Tensor:
    out = torch.eye(1, dtype=F64)
    for basis in bases:
        out = torch.kron(out, basis.contiguous())
    return out


class Dense:
    """SOAP with any rule on vec(G): P = Q_0 (x) .. (x) Q_k, m kept in the original coordinates."""

    def __init__(
        self,
        shape: tuple,
        rotated: tuple[bool, ...],
        betas: tuple[float, float],
        beta: float,
        way: str = "qr",
        overlaps: bool = False,
    ):
        self.shape, self.rotated, self.betas, self.beta = shape, rotated, betas, beta
        self.way, self.overlaps = way, overlaps
        self.gram = [torch.zeros(n, n, dtype=F64) for n in shape]
        self.bases = [torch.eye(n, dtype=F64) for n in shape]
        size = int(torch.tensor(shape).prod())
        self.mean, self.square = torch.zeros(size, dtype=F64), torch.zeros(size, dtype=F64)
        self.calls = 0

    def update(self, gradient: Tensor, refresh: bool, eps: float = 1e-8) -> Tensor | None:
        letters = "abcdef"[: gradient.ndim]
        for axis in range(gradient.ndim):
            other = letters.replace(letters[axis], "z")
            outer = torch.einsum(f"{letters},{other}->{letters[axis]}z", gradient, gradient)
            self.gram[axis] = self.beta * self.gram[axis] + (1 - self.beta) * outer
        self.calls += 1
        if self.calls == 1:
            for axis, wanted in enumerate(self.rotated):
                if wanted:
                    values, vectors = torch.linalg.eigh(self.gram[axis])
                    self.bases[axis] = vectors[:, values.argsort(descending=True)]
            return None
        k, (b1, b2) = self.calls - 1, self.betas
        p, g = kron(self.bases), gradient.reshape(-1)
        self.mean = b1 * self.mean + (1 - b1) * g
        self.square = b2 * self.square + (1 - b2) * (p.T @ g) ** 2
        scaled = (p.T @ self.mean / (1 - b1**k)) / ((self.square.sqrt() + eps) / (1 - b2**k) ** 0.5)
        result = (p @ scaled).reshape(self.shape)
        if refresh:
            self._refresh()
        return result

    def _refresh(self) -> None:
        before = kron(self.bases)
        moves = []
        for axis, wanted in enumerate(self.rotated):
            n = self.shape[axis]
            move = torch.eye(n, dtype=F64)
            if wanted:
                q = self.bases[axis]
                order = (q.T @ self.gram[axis] @ q).diagonal().argsort(descending=True)
                move = move[:, order]
                if self.way == "qr":
                    self.bases[axis] = torch.linalg.qr(self.gram[axis] @ q @ move).Q
                else:
                    values, vectors = torch.linalg.eigh(self.gram[axis])
                    self.bases[axis] = vectors[:, values.argsort(descending=True)]
            moves.append(move)
        if self.overlaps:
            self.square = ((before.T @ kron(self.bases)) ** 2).T @ self.square
        else:
            self.square = kron(moves).T @ self.square


CASES: list[tuple[tuple, dict[str, Any], tuple, tuple[bool, ...]]] = [
    # shape, options, working shape, which axes are rotated
    ((4, 4), {}, (4, 4), (True, True)),
    ((4, 5), {"max_precond_dim": 4}, (4, 5), (True, False)),
    ((5, 4), {"max_precond_dim": 4}, (5, 4), (False, True)),
    ((5, 6), {"max_precond_dim": 4}, (5, 6), (False, False)),
    ((1, 4), {}, (1, 4), (False, True)),
    ((4, 2, 3), {"merge_dims": True}, (4, 6), (True, True)),
    ((2, 3, 2, 2), {}, (2, 3, 2, 2), (True, True, True, True)),
    ((3, 2, 2, 2), {"merge_dims": True, "max_precond_dim": 6}, (3, 2, 4), (True, True, True)),
    ((2, 3, 5), {"merge_dims": "left", "max_precond_dim": 6}, (6, 5), (True, True)),
    ((2, 2, 2, 2, 2), {"merge_dims": "left", "max_precond_dim": 6}, (4, 4, 2), (True, True, True)),
    ((4,), {"precondition_1d": True}, (4,), (True,)),
    ((5,), {"precondition_1d": True, "max_precond_dim": 4}, (5,), (False,)),
    ((4,), {}, (4,), (False,)),
    ((), {}, (1,), (False,)),
]


@pytest.mark.parametrize("variant", ["qr", "eigh", "overlaps"])
@pytest.mark.parametrize(("shape", "options", "working", "rotated"), CASES, ids=str)
def test_the_dense_formulation(
    shape: tuple, options: dict, working: tuple, rotated: tuple, variant: str
) -> None:
    way = "eigh" if variant == "eigh" else "qr"
    chosen = {"precondition_frequency": 2, "zeroth_power_mode": way, "shampoo_beta": 0.8, **options}
    if variant == "overlaps":
        chosen["rotate_second_moment"] = True
    p = torch.nn.Parameter(normal(shape, 99))
    rule = C.scale_by_adam(betas=(0.9, 0.7), eps=1e-8, eps_placement="biased")
    opt = C.ChainOpt([p], 0.01, C.soap_precond(rule, **chosen))
    dense = Dense(working, rotated, (0.9, 0.7), 0.8, way, variant == "overlaps")
    expected = p.detach().clone()
    # every unfolding has full rank in the mean of the first gradients only if the first has it
    gradients = [normal(shape, seed) for seed in range(9)]
    full = all(n * n <= expected.numel() for n, r in zip(working, rotated, strict=True) if r)
    for call, gradient in enumerate(gradients):
        p.grad = gradient.clone()
        opt.step()
        update = dense.update(gradient.reshape(working), refresh=call > 0 and call % 2 == 0)
        if update is not None:
            expected = expected - 0.01 * update.reshape(shape)
        if call == 0 and not full:
            # the null space of the first mean has no basis of its own: take theirs
            _take_bases(opt, p, dense)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-11)
    assert (p - normal(shape, 99)).abs().max() > 0.01


def _take_bases(opt: torch.optim.Optimizer, p: Tensor, dense: Dense) -> None:
    for axis, wanted in enumerate(dense.rotated):
        if wanted:
            dense.bases[axis] = opt.state[p][f"to_eigenbasis.basis.{axis}"].mT.clone()


# ---- properties

RULES = {
    "adam": C.scale_by_adam(betas=(0.9, 0.7)),
    "amsgrad": C.scale_by_adam(betas=(0.9, 0.7), amsgrad=True),
    "laprop": C.scale_by_laprop(betas=(0.9, 0.7), eps=1e-8),
    "nadam": C.scale_by_nadam(betas=(0.9, 0.7)),
    "ademamix": C.scale_by_ademamix(betas=(0.9, 0.7, 0.99)),
    "squares": C.scale_by_exp_avg_sq(beta2=0.7),
}


@pytest.mark.parametrize("rule", RULES)
def test_without_a_basis_it_is_the_rule_from_the_second_gradient_on(rule: str) -> None:
    gradients = [normal((4, 3), seed) for seed in range(6)]
    ours, plain = (torch.nn.Parameter(normal((4, 3), 99)) for _ in range(2))
    within = C.soap_precond(RULES[rule], max_precond_dim=1)
    found = run(C.ChainOpt([ours], 0.01, within), ours, gradients)
    expected = run(C.ChainOpt([plain], 0.01, RULES[rule]), plain, gradients[1:])
    for one, other in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_palms_schedule_inside_counts_the_rules_own_steps() -> None:
    gradients = [normal((4, 3), seed) for seed in range(6)]
    ours, plain = (torch.nn.Parameter(normal((4, 3), 99)) for _ in range(2))
    options = {"weight_decay": 0.0, "palm": True}
    found = run(heavyball.SOAP([ours], 0.01, max_precond_dim=1, **options), ours, gradients)
    adam = heavyball.AdamW([plain], 0.01, betas=(0.9, 0.95), **options)
    for one, other in zip(found[1:], run(adam, plain, gradients[1:]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"rotate_second_moment": True}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_turned_gradients_give_turned_updates(rule: str, options: dict) -> None:
    left, right = (torch.linalg.qr(normal((5, 5), seed))[0] for seed in (1, 2))
    gradients = [normal((5, 5), seed) for seed in range(10, 18)]
    plain, turned = (torch.nn.Parameter(torch.zeros(5, 5, dtype=F64)) for _ in range(2))
    chain = C.soap_precond(RULES[rule], precondition_frequency=2, **options)
    found = run(C.ChainOpt([plain], 0.01, chain), plain, gradients)
    other = run(C.ChainOpt([turned], 0.01, chain), turned, [left @ g @ right for g in gradients])
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(left @ one @ right, two, rtol=0, atol=1e-11)
    # the rule alone is not like that
    plain, turned = (torch.nn.Parameter(torch.zeros(5, 5, dtype=F64)) for _ in range(2))
    run(C.ChainOpt([plain], 0.01, RULES[rule]), plain, gradients)
    run(C.ChainOpt([turned], 0.01, RULES[rule]), turned, [left @ g @ right for g in gradients])
    assert (left @ plain @ right - turned).abs().max() > 1e-3


def test_the_first_gradient_only_sets_up_the_basis() -> None:
    p = square_parameter()
    start = p.detach().clone()
    opt = heavyball.SOAP([p], 0.1, weight_decay=0.5, shampoo_beta=0.8, betas=(0.9, 0.5))
    (found,) = run(opt, p, [square_gradient(1)])
    assert torch.equal(found, start)
    state = opt.state[p]
    assert state["step"] == 1
    assert not state["scale_by_adam.exp_avg"].any()
    assert not state["scale_by_adam.exp_avg_sq"].any()
    g = square_gradient(1)
    # with the memory of the preconditioner, not that of the second moment
    for axis, outer in enumerate((g @ g.T, g.T @ g)):
        torch.testing.assert_close(state[f"to_eigenbasis.gram.{axis}"], 0.2 * outer)
        basis = state[f"to_eigenbasis.basis.{axis}"].T
        spectrum = (basis.T @ outer @ basis).diagonal()
        assert (spectrum[:-1] >= spectrum[1:]).all()
        torch.testing.assert_close(basis * spectrum @ basis.T, outer, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"precondition_frequency": 3}, [4, 7, 10]),
        ({"precondition_frequency": 1}, list(range(2, 12))),
        ({"precond_scheduler": heavyball.PrecondSchedule(a=2, b=2)}, None),
        ({"precond_scheduler": (2, 2)}, None),
    ],
    ids=str,
)
def test_the_basis_changes_when_the_schedule_fires(options: dict, steps: list | None) -> None:
    schedule = heavyball.PrecondSchedule(a=2, b=2)
    if steps is None:  # counted from the second gradient
        steps = [n for n in range(2, 12) if schedule.fires(n - 1)]
        assert 3 < len(steps) < 9
    p = square_parameter()
    opt = C.ChainOpt([p], 1e-3, C.soap_precond(**options))
    changed, before = [], None
    for n in range(1, 12):
        run(opt, p, [square_gradient(n)])
        basis = opt.state[p]["to_eigenbasis.basis.0"].clone()
        if before is not None and not torch.equal(before, basis):
            changed.append(n)
        before = basis
    assert changed == steps


def refreshes(opt: torch.optim.Optimizer, params: list, steps: int) -> dict[tuple[int, int], list]:
    """At which steps the bases of each parameter and axis changed."""
    found: dict[tuple[int, int], list] = {}
    before: dict[tuple[int, int], Tensor] = {}
    for n in range(steps):
        for place, p in enumerate(params):
            p.grad = normal(tuple(p.shape), 100 * n + place, p.dtype)
        opt.step()
        for place, p in enumerate(params):
            for axis in range(2):
                basis = opt.state[p][f"to_eigenbasis.basis.{axis}"].clone()
                if n and not torch.equal(basis, before[place, axis]):
                    found.setdefault((place, axis), []).append(n)
                before[place, axis] = basis
    return found


def test_refreshes_can_be_spread_over_the_interval() -> None:
    params = parameters(*[(4, 4)] * 8, (3, 5), (5, 4))
    chain = C.soap_precond(precondition_frequency=5, spread_refreshes=True)
    found = refreshes(C.ChainOpt(params, 1e-3, chain), params, 31)
    assert len(found) == 20
    for steps in found.values():
        assert all(later - earlier == 5 for earlier, later in itertools.pairwise(steps))
        assert len(steps) == 6
    load = [sum(n in steps for steps in found.values()) for n in range(1, 31)]
    assert max(load) <= 6
    assert min(load) >= 2
    together = parameters(*[(4, 4)] * 8, (3, 5), (5, 4))
    plain = C.ChainOpt(together, 1e-3, C.soap_precond(precondition_frequency=5))
    assert set(map(tuple, refreshes(plain, together, 11).values())) == {(5, 10)}


def test_spreading_changes_when_and_not_what() -> None:
    """A parameter's phase comes from its place, so a lone one can be compared with one of eight."""
    params = parameters(*[(4, 4)] * 8, dtype=F64)
    options = {"precondition_frequency": 4, "spread_refreshes": True}
    together = C.ChainOpt(params, 0.01, C.soap_precond(**options))
    alone = parameters(*[(4, 4)] * 8, dtype=F64)
    apart = C.ChainOpt(alone, 0.01, C.soap_precond(**options), foreach=False)
    for n in range(12):
        for place, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = normal((4, 4), 100 * n + place)
            q.grad = p.grad.clone()
        together.step()
        apart.step()
        for p, q in zip(params, alone, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


# ---- shapes and memory


@pytest.mark.parametrize(
    ("shape", "options", "factors"),
    [
        ((64, 32), {}, [64, 32]),
        ((64, 32), {"max_precond_dim": 32}, [32]),
        ((3000, 8), {}, [8]),
        ((3000, 8), {"max_precond_dim": 1000, "split": True}, [1000, 8, 1000, 8, 1000, 8]),
        ((64,), {}, []),
        ((64,), {"precondition_1d": True}, [64]),
        ((64,), {"precondition_1d": True, "max_precond_dim": 63}, []),
        ((), {"precondition_1d": True}, []),
        ((1, 9), {}, [9]),
        ((16, 8, 3), {}, [16, 24]),
        ((16, 8, 3, 3), {}, [16, 72]),
        ((16, 8, 3, 3), {"merge_dims": False}, [16, 8, 3, 3]),
        ((16, 8, 3, 3), {"merge_dims": "left", "max_precond_dim": 128}, [128, 9]),
        ((4, 2, 3, 3, 3), {}, [4, 54]),
        ((3, 16, 16), {"merge_dims": False}, [3, 16, 16]),
    ],
    ids=str,
)
def test_no_factor_is_held_that_was_not_planned(shape: tuple, options: dict, factors: list) -> None:
    p = torch.nn.Parameter(torch.zeros(shape))
    opt = heavyball.SOAP([p], **options)
    p.grad = normal(shape, 0, torch.float32)
    opt.step()
    held = {k: tuple(v.shape) for k, v in opt.state[p].items() if k.startswith("to_eigenbasis")}
    assert sorted(held.values()) == sorted([(n, n) for n in factors] * 2)
    p.grad = normal(shape, 1, torch.float32)
    opt.step()
    assert p.abs().max() > 0
    assert torch.isfinite(p).all()


def test_blocks_of_a_split_parameter_are_parameters_of_their_own() -> None:
    options = {"precondition_frequency": 2, "max_precond_dim": 4}
    whole = torch.nn.Parameter(normal((6, 7), 99))
    blocks = [
        torch.nn.Parameter(b.clone()) for rows in whole.detach().split(4) for b in rows.split(4, 1)
    ]
    opt = C.ChainOpt([whole], 0.01, C.soap_precond(split=True, **options))
    apart = C.ChainOpt(blocks, 0.01, C.soap_precond(**options))
    for seed in range(7):
        whole.grad = normal((6, 7), seed)
        pieces = [b for rows in whole.grad.split(4) for b in rows.split(4, 1)]
        for p, g in zip(blocks, pieces, strict=True):
            p.grad = g.clone()
        opt.step()
        apart.step()
        found = [b for rows in whole.detach().split(4) for b in rows.split(4, 1)]
        for one, other in zip(found, blocks, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=0, atol=1e-13)


def test_channels_last_kernels_are_stepped_as_others_are() -> None:
    plain = torch.nn.Parameter(normal((4, 3, 2, 2), 99))
    last = torch.nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    opts = [heavyball.SOAP([p]) for p in (plain, last)]
    for seed in range(5):
        for opt, p in zip(opts, (plain, last), strict=True):
            p.grad = torch.zeros_like(p).copy_(normal((4, 3, 2, 2), seed))
            opt.step()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain, last, rtol=0, atol=1e-12)


def test_normalized_updates_have_the_root_mean_square_one() -> None:
    p = torch.nn.Parameter(torch.zeros(5, 5, dtype=F64))
    opt = heavyball.SOAP([p], 0.5, weight_decay=0.0, normalize_grads=True)
    before = p.detach().clone()
    for value in run(opt, p, [100 * normal((5, 5), seed) for seed in range(5)])[1:]:
        assert abs(float((value - before).square().mean().sqrt()) - 0.5) < 1e-12
        before = value


def test_much_memory_is_warned_about_with_the_option_that_avoids_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(B, "device_memory", lambda device: 80 * 1024)

    def step(**options: Any) -> None:
        p = torch.nn.Parameter(torch.zeros(24, 8))
        p.grad = torch.ones(24, 8)
        heavyball.SOAP([p], **options).step()

    message = r"\(24, 8\) need 0 MiB, over 5% .* longest rotated axis has 24 .*max_precond_dim.* 12"
    # 2 * 4 bytes * (24^2 + 8^2) = 5120, a sixteenth of what there is
    with pytest.warns(UserWarning, match=message):
        step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(max_precond_dim=12)
        step(max_precond_dim=8, split=True)
    monkeypatch.undo()
    assert B.device_memory(torch.device("cpu")) > 2**28
    assert B.device_memory(torch.device("meta")) is None


# ---- hard gradients

HARD = {
    "zero": lambda seed: torch.zeros(8, 6, dtype=F64),
    "rank one": lambda seed: normal((8, 1), seed) @ normal((1, 6), seed + 50),
    "one row": lambda seed: normal((8, 6), seed) * (torch.arange(8) == 2)[:, None],
    "condition 1e12": lambda seed: normal((8, 6), seed) * torch.logspace(0, -12, 6, dtype=F64),
    "large": lambda seed: 1e20 * normal((8, 6), seed),
    "small": lambda seed: 1e-20 * normal((8, 6), seed),
    "infinite": lambda seed: normal((8, 6), seed).index_fill(0, torch.tensor(1), float("inf")),
}


# Seven steps of Adam in another basis. An entry is at most sqrt(48) times as far as one in the basis,
# and there |m| / sqrt(v) is at most (1 - beta1) / sqrt(1 - beta2) sum_i (beta1^2 / beta2)^(i / 2) < 10.
FARTHEST = 7 * 3e-3 * 10 * 48**0.5


@pytest.mark.parametrize("kind", HARD)
def test_rotated_second_moments_bound_the_step_whatever_the_gradients(kind: str) -> None:
    """With sorted ones a basis that turns by a rounding error takes 1e-7 of a first moment of 2^56 to
    where the second moment is of size 1."""
    for dtype in (torch.float32, F64):
        p = torch.nn.Parameter(normal((8, 6), 99, dtype))
        start = p.detach().clone()
        options = {"precondition_frequency": 1, "rotate_second_moment": True}
        opt = heavyball.SOAP([p], weight_decay=0.0, **options)
        run(opt, p, [HARD[kind](seed) for seed in range(8)])
        assert (p - start).abs().max() < FARTHEST * 48**0.5


@pytest.mark.parametrize("way", ["qr", "newtonschulz", "svd", "eigh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64], ids=str)
@pytest.mark.parametrize("kind", HARD)
def test_hard_gradients_leave_weights_finite_and_bases_orthogonal(
    kind: str, dtype: torch.dtype, way: str
) -> None:
    p = torch.nn.Parameter(normal((8, 6), 99, dtype))
    start = p.detach().clone()
    opt = heavyball.SOAP([p], weight_decay=0.0, precondition_frequency=1, zeroth_power_mode=way)
    run(opt, p, [HARD[kind](seed) for seed in range(8)])
    assert torch.isfinite(p).all()
    # eps is large beside gradients of 1e-20
    assert torch.equal(p, start) == (kind == "zero" or (kind == "small" and dtype != F64))
    if kind != "infinite":
        assert (p - start).abs().max() < FARTHEST
    for key, value in opt.state[p].items():
        assert torch.isfinite(value).all(), key
        if ".basis." in key:
            assert value.dtype == (F64 if dtype == F64 else torch.float32)
            error = value.T @ value - torch.eye(len(value), dtype=value.dtype)
            assert error.abs().max() < (1e-12 if dtype == F64 else 1e-5)


def test_a_gradient_that_is_not_finite_does_not_reach_the_preconditioner() -> None:
    p = torch.nn.Parameter(normal((5, 5), 99))
    opt = heavyball.SOAP([p], precondition_frequency=1)
    run(opt, p, [normal((5, 5), seed) for seed in range(3)])
    before = snapshot(opt)
    bad = normal((5, 5), 3)
    bad[2, 3] = float("nan")
    run(opt, p, [bad])
    for axis in range(2):
        gram = opt.state[p][f"to_eigenbasis.gram.{axis}"]
        # the scale does not matter to eigenvectors
        torch.testing.assert_close(gram, 0.95 * before[f"0.to_eigenbasis.gram.{axis}"])
        expected, _ = E.refreshed(gram[None], before[f"0.to_eigenbasis.basis.{axis}"].T[None], "qr")
        basis = opt.state[p][f"to_eigenbasis.basis.{axis}"].T
        torch.testing.assert_close(basis, expected[0], rtol=0, atol=1e-12)


def test_skipped_steps_leave_no_trace() -> None:
    good = [normal((5, 5), seed) for seed in range(5)]
    bad = torch.full((5, 5), float("nan"), dtype=F64)
    ours, plain = (torch.nn.Parameter(normal((5, 5), 99)) for _ in range(2))
    guarded = C.ChainOpt([ours], 0.01, C.skip_not_finite, C.soap_precond(precondition_frequency=2))
    run(guarded, ours, [bad, good[0], good[1], bad, *good[2:]])
    run(C.ChainOpt([plain], 0.01, C.soap_precond(precondition_frequency=2)), plain, good)
    assert torch.equal(ours, plain)


# ---- in company


def test_the_other_branch_of_a_graft_sees_the_first_gradient() -> None:
    p = torch.nn.Parameter(normal((5, 4), 99))
    opt = C.ChainOpt([p], 0.01, C.graft(C.soap_precond(), C.exp_avg(beta=0.5)), compile=False)
    gradients = [normal((5, 4), seed) for seed in range(3)]
    run(opt, p, gradients)
    mean = (0.25 * gradients[0] + 0.5 * gradients[1] + gradients[2]) / 1.75
    torch.testing.assert_close(opt.state[p]["exp_avg"], mean)


@pytest.mark.parametrize("shape", [(24, 10), (5, 4, 3), (7,), ()])
@pytest.mark.parametrize("options", [{}, {"split": True, "max_precond_dim": 8}], ids=str)
def test_the_memory_plan_is_what_is_held(shape: tuple, options: dict) -> None:
    p = torch.nn.Parameter(normal(shape, 99, torch.float32))
    opt = heavyball.SOAP([p], **options)
    run(opt, p, [normal(shape, 0)])
    plan = heavyball.memory_plan([torch.nn.Parameter(p.detach().to("meta"))], "SOAP", **options)
    assert plan.state_bytes == opt.state_bytes()


# ---- how it is written


def test_what_it_prints_is_what_was_written() -> None:
    chain = C.soap_precond(C.scale_by_laprop(betas=(0.9, 0.95)), precondition_frequency=3)
    assert (
        repr(chain) == "soap_precond(scale_by_laprop(betas=(0.9, 0.95)), precondition_frequency=3)"
    )
    assert repr(C.soap_precond()) == "soap_precond()"
    assert repr(C.soap_precond(normalize_grads=True)) == "soap_precond(normalize_grads=True)"


def test_the_command_line_reads_it() -> None:
    from heavyball.core.text import parse_chain

    text = "soap_precond(palm_beta2 | scale_by_nadam, merge_dims='left') | cautious"
    chain = parse_chain(text)
    p = torch.nn.Parameter(normal((4, 4), 0))
    opt = C.ChainOpt([p], 0.01, *chain)
    run(opt, p, [normal((4, 4), seed) for seed in range(3)])
    assert "scale_by_nadam.exp_avg" in opt.state[p]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precond_scheduler": (1, 2, 3)}, TypeError, r"precond_scheduler=\(1, 2, 3\)"),
        ({"precond_scheduler": "often"}, TypeError, "precond_scheduler='often'"),
        ({"precondition_frequency": 0}, ValueError, "precondition_frequency=0"),
        ({"max_precond_dim": 0}, ValueError, "max_precond_dim=0"),
        ({"merge_dims": "up"}, ValueError, "merge_dims='up': expected one of False, True, 'left'"),
        ({"zeroth_power_mode": "cholesky"}, ValueError, "expected one of 'qr'"),
        ({"shampoo_beta": 1.0}, ValueError, r"shampoo_beta=1.0: expected in \[0, 1\)"),
        ({"precondition_frequncy": 2}, TypeError, "did you mean 'precondition_frequency'"),
    ],
    ids=str,
)
def test_wrong_options_raise_when_the_chain_is_written(
    options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        C.soap_precond(**options)
    with pytest.raises(error, match=message):
        heavyball.SOAP(parameters((2, 2)), **options)


def test_a_frequency_and_a_schedule_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="precondition_frequency=5 has no effect with"):
        heavyball.PrecondScheduleSOAP(parameters((2, 2)), precondition_frequency=5)
    opt = heavyball.PrecondScheduleSOAP(parameters((2, 2)), precond_scheduler=None)
    assert "precond_scheduler=None" in repr(opt)


def test_the_way_back_needs_the_way_there() -> None:
    with pytest.raises(ValueError, match="from_eigenbasis asks for 'bases'"):
        C.ChainOpt(parameters((2, 2)), 1e-3, C.from_eigenbasis)


@pytest.mark.parametrize("way", ["eigh", "newtonschulz", "newtonschulz5", "svd", "qr"])
def test_the_process_decides_how_a_basis_is_refreshed_where_nobody_says(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(**options: Any) -> list[Any]:
        rule = C.soap_precond(C.scale_by_laprop, **options)
        lazy = {"precond_scheduler": None, "precondition_frequency": 1}
        return [
            heavyball.SOAP(parameters((3, 3)), **options),
            heavyball.PrecondSchedulePaLMSOAP(parameters((3, 3)), **lazy, **options),
            C.ChainOpt(parameters((3, 3)), 0.01, rule),
        ]

    before = made()
    monkeypatch.setattr(heavyball.utils, "zeroth_power_mode", way)
    for opt, given, early in zip(made(), made(zeroth_power_mode=way), before, strict=True):
        assert opt.state_dict()["heavyball"] == given.state_dict()["heavyball"]
        same = opt.state_dict()["heavyball"] == early.state_dict()["heavyball"]
        assert same == (way == "qr")  # those that were built before keep theirs
    told = heavyball.SOAP(parameters((3, 3)), zeroth_power_mode="qr")
    assert told.state_dict()["heavyball"] == before[0].state_dict()["heavyball"]


@pytest.mark.parametrize(
    "way", ["newtonschulz0", "newtonschulz-1", "newtonschulz101", "QR", None, 5]
)
def test_a_way_to_refresh_that_is_not_known_is_refused(
    way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=f"zeroth_power_mode={way!r}: expected one of 'qr'"):
        heavyball.SOAP(parameters((3, 3)), zeroth_power_mode=way)
    monkeypatch.setattr(heavyball.utils, "zeroth_power_mode", way)
    for build in (heavyball.SOAP, lambda params: C.ChainOpt(params, 0.01, C.soap_precond())):
        with pytest.raises(ValueError, match=r"heavyball\.utils\.zeroth_power_mode="):
            build(parameters((3, 3)))
    heavyball.SOAP(parameters((3, 3)), zeroth_power_mode="eigh")


@pytest.mark.parametrize(("way", "off"), [("newtonschulz5", 0.5), ("newtonschulz12", 1e-5)])
def test_a_number_of_steps_for_the_polar_factor(way: str, off: float) -> None:
    gram = normal((1, 6, 6), 1).float()
    gram = gram @ gram.mT
    basis = torch.linalg.qr(normal((1, 6, 6), 2).float()).Q
    new, _ = E.refreshed(gram, basis, way)
    usual, _ = E.refreshed(gram, basis, "newtonschulz")
    torch.testing.assert_close(new, usual, rtol=0, atol=off)
    assert torch.equal(new, usual) == (way == "newtonschulz8")
