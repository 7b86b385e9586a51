"""palm_beta2: its values, the golden values, and every second moment that it reaches."""

import math

import pytest
import torch
from helpers import (
    EPS,
    chain,
    close,
    golden_path,
    gradients,
    matches_golden,
    prefixes,
    starts,
    states,
    updates,
    walk,
    weighted_mean,
)

from heavyball import chainable as C


def beta2_at(step: int, **options: object) -> float:
    palm = C.palm_beta2(**options)
    arguments = {
        name: torch.tensor(value, dtype=torch.float64) for name, value in palm.hyper.items()
    }
    _, beta2 = palm.update(
        torch.zeros(1), step=torch.tensor(step, dtype=torch.float64), **palm.options, **arguments
    )
    return float(beta2)


def test_the_schedule_has_the_papers_values() -> None:
    expected = {
        1: 0.0, 2: 0.4256508225, 3: 0.5847563535, 10: 0.8415106808, 100: 0.9748811357,
        1000: 0.9960189283,
    }  # fmt: skip
    for step, value in expected.items():
        assert math.isclose(beta2_at(step), value, rel_tol=5e-10)
        # 1 - (1 - x) rounds once, and is up to 250 times smaller than 1
        assert math.isclose(1 - beta2_at(step), step**-0.8, rel_tol=3 * 250 * EPS)


@pytest.mark.parametrize(
    ("debias", "expected"),
    [
        (
            False,
            """[0.9000000011, -2.099999986, 3.099999999, 4.099999999]
            | [0.8000000023, -2.036254807, 3.189732704, 4.092663547]
            | [0.7000000034, -1.958785357, 3.182994698, 4.125831363]""",
        ),
        (
            True,
            """[0.9000000011, -2.099999986, 3.099999999, 4.099999999]
            | [0.8000000023, -2.04224712, 3.203902512, 4.092702098]
            | [0.7000000034, -1.970238617, 3.197342883, 4.12565758]""",
        ),
    ],
    ids=["once", "twice"],
)
def test_the_golden_values(debias: bool, expected: str) -> None:
    palm = C.palm_beta2(debias=debias)
    matches_golden(golden_path(chain(palm, C.scale_by_adam), 3), expected)


def scheduled_mean(xs: list[torch.Tensor], scale: float) -> torch.Tensor:
    """The average with the weight t^-scale for the newest, as one explicit sum."""
    shares = [t**-scale for t in range(1, len(xs) + 1)]
    weights = [share * math.prod(1 - s for s in shares[i + 1 :]) for i, share in enumerate(shares)]
    return sum(w * x for w, x in zip(weights, xs, strict=True))


SECOND_MOMENTS = [n for n, t in C.TRANSFORMS.items() if "scheduled_beta2" in t.optional]


@pytest.mark.parametrize("scale", [0.8, 0.5])
@pytest.mark.parametrize("name", SECOND_MOMENTS)
def test_it_rules_every_second_moment_behind_it(name: str, scale: float) -> None:
    grads = [g for (g,) in gradients(7, [(3, 4)])]
    transform = C.TRANSFORMS[name]
    # adopt starts with g^2 too, so that its average is the same one
    found = states([C.palm_beta2(beta2_scale=scale), transform], grads)[f"{name}.exp_avg_sq"]
    close(found, scheduled_mean([g**2 for g in grads], scale), atol=7 * 8 * EPS * 100)


def test_these_transforms_have_a_second_moment() -> None:
    assert SECOND_MOMENTS == [
        "delayed_rms", "factored_rms", "scale_by_adam", "scale_by_adam_atan2", "scale_by_ademamix",
        "scale_by_adopt", "scale_by_exp_avg_sq", "scale_by_gradient_rms", "scale_by_laprop",
        "scale_by_nadam", "stable_adamw",
    ]  # fmt: skip


def test_it_reaches_nothing_before_it_no_first_moment_and_no_other_optimizer() -> None:
    grads = [g for (g,) in gradients(6, [(3, 4)])]
    first = C.scale_by_exp_avg_sq(beta2=0.9, eps=0.0)
    before = updates([first, C.palm_beta2, C.scale_by_exp_avg_sq(beta2=0.9)], grads)
    alone = updates([first], grads)
    behind = updates([C.palm_beta2, first], grads)
    adam = updates([C.palm_beta2, C.scale_by_adam(betas=(0.7, 0.9), eps=0.0)], grads)
    for t, past in enumerate(prefixes(grads)):
        v = weighted_mean([g**2 for g in past], 0.9)
        close(alone[t], past[-1] / v.sqrt(), atol=40 * EPS * 10 * 10)
        root = scheduled_mean([g**2 for g in past], 0.8).sqrt()
        close(behind[t], past[-1] / root, atol=40 * EPS * 10 * 10)
        close(adam[t], weighted_mean(past, 0.7) / root, atol=40 * EPS * 10 * 10)
        normalized = scheduled_mean([u**2 for u in alone[: t + 1]], 0.8).sqrt()
        # eps is 1e-8 there, for updates below 10 over a root above 0.01
        close(before[t], alone[t] / normalized, rtol=1e-6, atol=0.0)


def test_without_palm_a_beta2_is_the_one_given() -> None:
    begin, grads = starts(), gradients(6)
    with_palm = walk(chain(C.palm_beta2, C.scale_by_adam), begin, grads)
    plain = walk(chain(C.scale_by_adam), begin, grads)
    torch_adam = walk(lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.0), begin, grads)
    assert (with_palm[-1][1] - plain[-1][1]).abs().max() > 1e-3
    close(plain[-1][1], torch_adam[-1][1], atol=6 * EPS * 40 * 10 * 1000)
