"""orthogonalize, muon and scale_by_normuon against golden values, torch.optim.Muon and the SVD."""

import itertools
import math

import pytest
import torch
from helpers import (
    chain,
    close,
    decayed_sum,
    gradients,
    h_grads,
    m_start,
    matches_golden,
    of_one,
    prefixes,
    starts,
    summary,
    updates,
    walk,
)
from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg import orthogonalize
from heavyball.linalg.matrices import matrices_of
from heavyball.linalg.orthogonalize import TABLES, newton_schulz, polar_factor, table

METHODS = ("quintic", "quintic-5", "polar_express", "svd")
TABLED = tuple(TABLES)


def golden(*elements: object) -> list[Tensor]:
    return [summary(p) for (p,) in walk(chain(*elements, lr=0.02), [m_start()], of_one(h_grads(3)))]


def test_the_golden_values_of_muon() -> None:
    matches_golden(
        golden(C.muon),
        """0.8304188422, 0.8439637946, -0.7753262815, 1.009350072, 24.14102483
        | 0.8226326984, 0.8417655143, -0.7730039485, 0.8897719672, 24.11960549
        | 0.8260320976, 0.8353010933, -0.7819678493, 0.7780254846, 24.1591582""",
    )
    matches_golden(
        golden(C.muon(scale="match_rms_adamw")),
        """0.8360565628, 0.8402358892, -0.7717190336, 1.064264922, 24.13836267
        | 0.832242147, 0.8391589562, -0.7705813274, 1.005683854, 24.12679534
        | 0.8339075056, 0.8359920496, -0.774972724, 0.9509394813, 24.14455823""",
    )


def test_the_golden_values_of_orthogonalize() -> None:
    (h, *_) = h_grads(1)
    found = {name: updates([C.orthogonalize(method=name)], [h])[0] for name in METHODS}
    matches_golden(
        [summary(found[name]) for name in ("quintic", "quintic-5", "svd")],
        """0.4785718469, -0.3164523475, 0.306210148, 4.661581528, 5.408178252
        | 0.4004429107, -0.4492324868, 0.3896492363, 5.669311205, 6.026754312
        | 0.4061815597, -0.4500340951, 0.3832709167, 5.692541842, 6""",
    )
    values = torch.linalg.svdvals(found["quintic"])
    expected = [1.13216, 1.1305, 1.05216, 0.897259, 0.68541, 0.682961]
    close(values, torch.tensor(expected, dtype=torch.float64), atol=6e-6)
    (express,) = updates([C.orthogonalize(method="polar_express", steps=8)], [h])
    # eight steps end quadratically; what is left are roundings
    close(express, found["svd"], atol=1e-13)


def test_the_golden_values_of_normuon() -> None:
    matches_golden(
        golden(C.scale_by_normuon)[2:],
        "0.8267311654, 0.8352488259, -0.7816995988, 0.7742642404, 24.14782424",
    )


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_momentum_is_an_explicit_sum(nesterov: bool) -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    ours = updates([C.muon_momentum(momentum=0.7, nesterov=nesterov)], grads)
    for found, past in zip(ours, prefixes(grads), strict=True):
        mean = 0.3 * decayed_sum(past, 0.7)
        close(found, 0.3 * past[-1] + 0.7 * mean if nesterov else mean, atol=1e-14)


def scalar_polynomials(values: Tensor, method: str, steps: int) -> Tensor:
    """What Newton-Schulz does to each singular value, in plain numbers."""
    for k in range(steps):
        a, b, c = TABLES[method][min(k, len(TABLES[method]) - 1)]
        if method == "polar_express" and k < len(TABLES[method]) - 1:
            a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
        values = a * values + b * values**3 + c * values**5
    return values


@pytest.mark.parametrize("method", TABLED)
@pytest.mark.parametrize(
    "shape", [(6, 6), (9, 5), (5, 9), (4, 30), (30, 4), (1, 7), (7, 1), (1, 1)]
)
def test_each_singular_value_goes_through_the_polynomials(
    method: str, shape: tuple[int, int]
) -> None:
    (x,) = starts([shape], seed=3)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    for steps in (0, 1, 4, 9):
        found = newton_schulz(x, method, steps, 1e-7, 2.5)
        goal = 2.5 * scalar_polynomials(s / (s.norm() + 1e-7), method, steps)
        # the slope at 0 of the steps together is at most 8.3 * 4.2 * ... < 1e5
        close(found, (u * goal) @ vh, atol=1e-10, rtol=1e-10)


def conditioned(rows: int, columns: int, condition: float) -> Tensor:
    """A matrix with singular values from 1 to 1 / condition."""
    made = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, generator=made, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, generator=made, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)
    return (u * values) @ v.mT


def test_the_gram_form_has_as_many_digits_in_float32_as_products_with_the_matrix() -> None:
    x = conditioned(48, 200, 1e5)
    for method, steps in itertools.product(TABLED, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12)):
        unit, rows = x / x.norm(), table(method, steps)
        exact = orthogonalize.plain_form(unit.clone(), rows)
        plain = orthogonalize.plain_form(unit.float(), rows).double()
        for turned in (x, x.mT):
            t = C.orthogonalize(method=method, steps=steps)
            (found,) = updates([t], [turned.float()])
            wrong = (found.double() - (exact if turned is x else exact.mT)).abs().max()
            assert wrong < 10 * (plain - exact).abs().max(), (method, steps)


@pytest.mark.parametrize("restart", [(), (1,), (2,), (2, 4), (1, 2, 3, 4), (4,), None])
def test_where_the_gram_form_begins_anew_changes_nothing_but_the_rounding(restart) -> None:
    for shape in ((7, 40), (40, 7)):
        (x,) = starts([shape], seed=3)
        for method in TABLED:
            t = C.orthogonalize(method=method, restart=restart)
            plain = orthogonalize.plain_form(x / (x.norm() + 1e-7), table(method, 5))
            close(updates([t], [x])[0], plain, atol=1e-12)


def test_restarts_that_cannot_be_are_refused() -> None:
    (p,) = starts([(4, 12)])
    for t in (C.orthogonalize, C.muon, C.scale_by_normuon):
        for wrong in ((0,), (2, -1), (1.5,), (True,)):
            with pytest.raises(ValueError, match=r"restart=.*: expected None or a tuple of steps"):
                C.ChainOpt([p], 1.0, t(restart=wrong))
        for more in ({"method": "svd"}, {"products": "bfloat16"}):
            with pytest.raises(ValueError, match=r"restart=\(2,\) has no effect with"):
                C.ChainOpt([p], 1.0, t(restart=(2,), **more))


def test_a_batch_is_its_matrices_one_by_one() -> None:
    (x,) = starts([(5, 4, 7)])
    for method in METHODS[:3]:
        one_by_one = torch.stack([newton_schulz(m, method) for m in x])
        close(newton_schulz(x, method), one_by_one, atol=1e-13)
    close(polar_factor(x), torch.stack([polar_factor(m) for m in x]), atol=1e-13)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_it_is_torchs_muon_but_for_bfloat16(nesterov: bool, adjust: str) -> None:
    shapes = [(8, 6), (6, 8), (16, 3)]
    begin, grads = starts(shapes), gradients(4, shapes)
    elements = C.muon(nesterov=nesterov, scale=adjust, momentum=0.9)
    ours = walk(chain(elements, lr=0.02, weight_decay=0.1), begin, grads)
    theirs = walk(
        lambda ps: torch.optim.Muon(
            ps, 0.02, 0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust
        ),
        begin,
        grads,
    )
    # an entry of theirs is off by about 3.5e-2, times the scale of at most 0.8 or 2.3, four times
    scale = 0.8 if adjust == "match_rms_adamw" else 2.31
    for a, b in zip(ours, theirs, strict=True):
        for x, y in zip(a, b, strict=True):
            close(x, y, atol=4 * 0.02 * scale * 3.5e-2)
            # and it is an approximation of theirs, not of standing still
    moved = ours[-1][0] - begin[0]
    assert (moved - (theirs[-1][0] - begin[0])).norm() < 0.05 * moved.norm()


def test_the_scales() -> None:
    for shape in ((12, 3), (3, 12)):
        (x,) = starts([shape])
        rows, columns = shape
        plain = updates([C.orthogonalize], [x])[0]
        for scale, factor in {
            "original": max(1.0, rows / columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
            "spectral": (rows / columns) ** 0.5,
            "graft": x.norm() / plain.norm(),
        }.items():
            close(updates([C.orthogonalize(scale=scale)], [x])[0], plain * factor, atol=1e-13)
            exact = updates([C.orthogonalize(scale=scale, method="svd")], [x])[0]
            sized = (x.norm() / 3**0.5) if scale == "graft" else torch.tensor(factor)
            close(torch.linalg.matrix_norm(exact, 2), sized.double(), atol=1e-6)


def test_match_rms_adamw_has_the_rms_that_it_is_named_for() -> None:
    (x,) = starts([(50, 20)])
    (exact,) = updates([C.orthogonalize(scale="match_rms_adamw", method="svd")], [x])
    # 20 singular values of 1 in 1000 entries, times 0.2 sqrt(50)
    close(exact.square().mean().sqrt(), torch.tensor(0.2, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 3, 2, 2), (4, 5, 3), (2, 3, 2, 2, 2)])
def test_kernels_are_matrices_of_their_first_axis_and_the_rest(shape: tuple[int, ...]) -> None:
    grads = [g for (g,) in gradients(3, [shape])]
    for t in (C.muon, C.orthogonalize(scale="original"), C.scale_by_normuon):
        flat = updates([t], [g.reshape(shape[0], -1) for g in grads])
        for ours, matrix in zip(updates([t], grads), flat, strict=True):
            close(ours, matrix.reshape(shape), atol=1e-14)


@pytest.mark.parametrize("t", [C.muon, C.scale_by_normuon, C.orthogonalize(scale="graft")])
def test_stacked_matrices_are_separate_ones(t: object) -> None:
    shape = (3, 2, 4, 5)
    grads = [g for (g,) in gradients(3, [shape])]
    together = updates([t(stacked=True)], grads)
    for i, j in itertools.product(range(3), range(2)):
        alone = updates([t], [g[i, j] for g in grads])
        for ours, single in zip(together, alone, strict=True):
            close(ours[i, j], single, atol=1e-13)


def normuon_by_hand(grads: list[Tensor], mu: float, beta2: float) -> list[Tensor]:
    b = square = 0.0
    found = []
    for g in grads:
        b = mu * b + (1 - mu) * g
        o = newton_schulz((1 - mu) * g + mu * b)
        square = beta2 * square + (1 - beta2) * (o**2).sum(1) / o.shape[1]
        even = o / (square**0.5 + 1e-10)[:, None]
        found.append(even * ((o**2).sum() / (even**2).sum()) ** 0.5)
    return found


def test_normuon_is_its_definition_written_out() -> None:
    grads = [g for (g,) in gradients(5, [(4, 9)])]
    ours = updates([C.scale_by_normuon(momentum=0.8, beta2=0.7, scale="none")], grads)
    for a, b in zip(ours, normuon_by_hand(grads, 0.8, 0.7), strict=True):
        close(a, b, atol=1e-9)  # row_eps is also in the second quotient


@pytest.mark.parametrize(
    ("shape", "stacked"), [((6, 4), False), ((4, 6), False), ((3, 5, 4), True)]
)
def test_a_grafted_normuon_has_the_size_of_the_momentum(shape: tuple, stacked: bool) -> None:
    grads = [g for (g,) in gradients(3, [shape])]
    found = updates([C.scale_by_normuon(scale="graft", momentum=0.9, stacked=stacked)], grads)
    for t, update in enumerate(found, start=1):
        buffer = 0.1 * decayed_sum(grads[:t], 0.9)
        given = 0.1 * grads[t - 1] + 0.9 * buffer
        axes = (-2, -1)
        expected = torch.linalg.vector_norm(given, dim=axes)
        close(
            torch.linalg.vector_norm(update, dim=axes), expected, atol=1e-8 * expected.max().item()
        )


@pytest.mark.parametrize("method", METHODS)
def test_zero_rank_deficient_and_badly_conditioned_gradients(method: str) -> None:
    (x,) = starts([(6, 9)])
    (zero,) = updates([C.muon(method=method)], [torch.zeros_like(x)])
    assert torch.equal(zero, torch.zeros_like(x))
    thin = torch.outer(x[:, 0], x[0])
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    steep = (u * torch.logspace(0, -12, 6, dtype=torch.float64)) @ vh
    for grad in (thin, steep):
        (found,) = updates([C.orthogonalize(method=method)], [grad])
        assert torch.linalg.matrix_norm(found, 2) < 1.3
        # along the leading pair it is the polar factor
        a, _, b = torch.linalg.svd(grad, full_matrices=False)
        assert 0.65 < a[:, 0] @ found @ b[0] < 1.3


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_stays_in_its_own_matrix_and_raises_nothing(method: str) -> None:
    (x,) = starts([(3, 4, 5)])
    (clean,) = updates([C.orthogonalize(method=method, stacked=True)], [x])
    broken = x.clone()
    broken[1, 2, 3] = torch.nan
    (found,) = updates([C.orthogonalize(method=method, stacked=True)], [broken])
    assert found[1].isnan().all()
    close(found[[0, 2]], clean[[0, 2]], atol=1e-13)


def test_an_svd_that_does_not_converge_is_done_again_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = starts([(4, 6)])[0].float()
    expected, svd = polar_factor(x), torch.linalg.svd

    def stubborn(a: Tensor, **options: bool) -> tuple:
        if a.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(a, **options)

    monkeypatch.setattr(torch.linalg, "svd", stubborn)
    found = polar_factor(x)
    assert found.dtype == torch.float32
    close(found, expected, atol=1e-5)


def test_polar_express_shrinks_all_polynomials_but_the_last() -> None:
    rows = table("polar_express", 10)
    assert rows[7:] == (TABLES["polar_express"][-1],) * 3
    a, b, c = TABLES["polar_express"][0]
    assert rows[0] == (a / 1.01, b / 1.01**3, c / 1.01**5)


@pytest.mark.parametrize("t", [C.muon, C.orthogonalize, C.scale_by_normuon])
@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_below_two_dimensions_it_raises_unless_routed(t: object, shape: tuple[int, ...]) -> None:
    param = torch.nn.Parameter(torch.ones(shape))
    with pytest.raises(ValueError, match=f"of shape .*: {t.name} needs a matrix"):
        C.ChainOpt([param], 0.1, t)
    C.ChainOpt([param], 0.1, C.route(C.when(t, min_ndim=2), otherwise=C.sign))


def test_products_in_bfloat16_are_those_of_torchs_muon() -> None:
    """Entries of a float64 and a bfloat16 iteration differ by up to 3.5e-2, see the spec's values."""
    x = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(x, products="full")
    narrow = newton_schulz(x, products="bfloat16")
    assert narrow.dtype == torch.float32
    error = (narrow - exact).abs().max()
    assert 1e-4 < error < 3.5e-2
    assert torch.equal(newton_schulz(x, products="auto"), exact)  # on a CPU
    # torch's own, with its own products in bfloat16: the same operations in the same dtype
    ours = torch.nn.Parameter(torch.zeros(12, 40))
    theirs = torch.nn.Parameter(torch.zeros(12, 40))
    pair = (
        C.ChainOpt([ours], 0.02, C.muon(products="bfloat16")),
        torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0),
    )
    for opt, param in zip(pair, (ours, theirs), strict=True):
        param.grad = x[0].clone()
        opt.step()
    assert (ours - theirs).abs().max() < 0.02 * 2e-2


def test_an_exact_factor_has_no_products() -> None:
    with pytest.raises(ValueError, match="no products to make in bfloat16"):
        C.ChainOpt([torch.zeros(3, 3)], 0.1, C.muon(method="svd", products="bfloat16"))


SAID: list[dict] = [
    {"products": "bfloat16"},
    {"products": "bfloat16", "method": "cubic", "normalize": "aol"},
    {"products": "bfloat16", "scale": "graft"},
    {"products": "bfloat16", "blocks": 2},
    {"products": "bfloat16", "steps": 0},
    {"products": "full"},
    {"method": "svd"},
]


@pytest.mark.parametrize("made", [C.orthogonalize, C.muon, C.scale_by_normuon], ids=str)
@pytest.mark.parametrize("options", SAID, ids=str)
def test_an_update_may_arrive_in_the_dtype_that_is_said_of_it(made, options: dict) -> None:
    transform, shape = made(**options), torch.Size((12, 8))
    given = shape, transform.options, torch.float32, torch.device("cpu")
    there, back = transform.rounds(*given)
    narrow = options.get("products") == "bfloat16" and options.get("steps", 5) > 0
    assert (there is not None) == (narrow and options.get("scale") != "graft")
    assert (back is not None) == (there is not None and made is not C.scale_by_normuon)

    def answer(x: Tensor) -> Tensor:
        named = {k: v for k, v in transform.options.items() if k != "nesterov"}
        if made is not C.scale_by_normuon:
            return transform.update(x, **named, eps=1e-7)
        row_square = matrices_of(shape, named).row_shape
        live = {"eps": 1e-7, "beta2": 0.95, "row_eps": 1e-10}
        return transform.update(x, torch.ones(1, *row_square), **named, **live)[0]

    torch.manual_seed(0)
    x = torch.randn(1, *shape)
    arrived = x if there is None else x.to(there).to(x.dtype)
    assert torch.equal(answer(x), answer(arrived))
    result = answer(x)
    assert back is None or torch.equal(result.to(back).to(result.dtype), result)


def test_a_processor_with_units_for_bfloat16_uses_them_for_large_matrices(monkeypatch) -> None:
    made = torch.Generator().manual_seed(0)
    for units in (False, True):
        monkeypatch.setattr(orthogonalize, "has_amx", lambda found=units: found)
        for shape, large in (((256, 300), True), ((255, 300), False), ((256, 2048), False)):
            x = torch.randn(shape, generator=made)
            way = "bfloat16" if units and large else "full"
            auto = newton_schulz(x, products="auto")
            assert torch.equal(auto, newton_schulz(x, products=way))
            exact = newton_schulz(x.double(), products="auto")
            assert torch.equal(exact, newton_schulz(x.double(), products="full"))
