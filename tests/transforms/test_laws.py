"""The compressing functions against golden values and a loop with the functions of `math`."""

import math

import pytest
import torch
from helpers import EPS, SHAPES, close, examples, gradients, matches_golden, updates
from hypothesis import given
from hypothesis import strategies as st

from heavyball import chainable as C

POINTS = torch.tensor([-3.0, -0.5, -0.01, 0.0, 0.2, 1.0, 5.0], dtype=torch.float64)


def test_the_golden_values() -> None:
    matches_golden(
        [updates([t], [POINTS])[0] for t in (C.trust_region, C.mu_law, C.a_law)],
        """-1.466229076 -0.4771945065 -0.009996548077 0 0.1977153358 0.8633808198 1.566518816
        | -1.225346975 -0.8587467508 -0.1689560425 0 0.6746380035 1 1.330411851
        | -1.200741139 -0.8733464429 -0.1600648738 0 0.7059195475 1 1.294080453""",
    )


def trust_region(x: float, lerp: float = 0.9, scale: float = 1.5) -> float:
    y = abs(x) / scale
    value = scale * ((1 - lerp) * math.log(1 + y) + lerp * math.tanh(y))
    return math.copysign(min(value, 2.0), x)


def mu_law(x: float, mu: float = 127.0) -> float:
    return math.copysign(math.log(1 + mu * abs(x)) / math.log(1 + mu), x)


def a_law(x: float, a: float = 87.6) -> float:
    h = a * abs(x)
    return math.copysign((h if h < 1 else 1 + math.log(h)) / (1 + math.log(a)), x)


def softsign(x: float) -> float:
    return 2 * x / (1 + abs(x))


SETTINGS = [
    (trust_region, {}),
    (trust_region, {"lerp": 0.3, "scale": 0.7}),
    (trust_region, {"lerp": 0.0, "scale": 5.0}),
    (mu_law, {}),
    (mu_law, {"mu": 3.0}),
    (a_law, {}),
    (a_law, {"a": 2.0}),
    (softsign, {}),
]


@pytest.mark.parametrize(("law", "options"), SETTINGS, ids=lambda x: getattr(x, "__name__", str(x)))
@examples(25)
@given(xs=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=9))
def test_each_law_is_the_formula(law: object, options: dict, xs: list[float]) -> None:
    points = torch.tensor(xs, dtype=torch.float64)
    (ours,) = updates([C.TRANSFORMS[law.__name__](**options)], [points])
    expected = torch.tensor([law(x, **options) for x in xs], dtype=torch.float64)
    # log(1 + y) for small y loses y's digits in the loop, not in ours: an absolute error
    close(ours, expected, rtol=20 * EPS, atol=20 * EPS)


@pytest.mark.parametrize("name", ["trust_region", "mu_law", "a_law", "softsign"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_law_is_odd_and_grows_and_keeps_the_sign(name: str, shape: tuple[int, ...]) -> None:
    for (grad,) in gradients(4, [shape]):
        (there,) = updates([C.TRANSFORMS[name]], [grad])
        (back,) = updates([C.TRANSFORMS[name]], [-grad])
        assert torch.equal(back, -there)
        assert torch.equal(there.sign(), grad.sign())
        order = grad.flatten().argsort()
        assert (there.flatten()[order].diff() >= 0).all()


def test_two_of_them_are_bounded_by_two() -> None:
    far = torch.tensor([-1e30, 1e30], dtype=torch.float64)
    assert updates([C.trust_region], [far])[0].tolist() == [-2.0, 2.0]
    assert updates([C.softsign], [far])[0].tolist() == [-2.0, 2.0]


@examples(40)
@given(a=st.floats(1e-3, 1e3), mu=st.floats(1e-3, 1e3))
def test_a_law_keeps_the_sign_for_every_constant_that_it_accepts(a: float, mu: float) -> None:
    points = torch.tensor([-2.0, -1e-3, 1e-3, 2.0], dtype=torch.float64)
    assert torch.equal(updates([C.mu_law(mu=mu)], [points])[0].sign(), points.sign())
    try:
        law = C.a_law(a=a)
    except ValueError:
        assert a < 1
        return
    assert torch.equal(updates([law], [points])[0].sign(), points.sign())
