"""cautious and grams against golden values, three packages, and a loop over the entries."""

import math

import pytest
import torch
from adam_atan2_pytorch import AdamAtan2
from helpers import (
    EPS,
    bound,
    chain,
    close,
    examples,
    golden_path,
    gradients,
    matches_golden,
    moves,
    param_as_update,
    same_path,
    starts,
    updates,
    walk,
)
from hypothesis import given
from hypothesis import strategies as st
from pytorch_optimizer import Grams, Lion

from heavyball import chainable as C


def authors_adam() -> object:
    """eps beside the root of the biased second moment, as both papers' authors have it."""
    return C.scale_by_adam(betas=(0.9, 0.999), eps=1e-6, eps_placement="biased")


THREE = """[0.9000036033, -2.099955315, 3.099996053, 4.099996623]
| [0.8000061518, -2.031722856, 3.18373501, 4.092637581]
| [0.7000082332, -1.948897144, 3.176851262, 4.125976393]"""


def test_the_golden_values_of_cautious() -> None:
    matches_golden(
        golden_path(chain(authors_adam(), C.cautious), 5),
        f"""{THREE} | [0.6000100363, -1.872232184, 3.196489833, 4.119767137]
        | [0.4666788537, -1.872232184, 3.240660283, 4.146099461]""",
    )
    matches_golden(
        golden_path(chain(authors_adam(), C.cautious(scale="sum_plus_one")), 5)[-1:],
        "[0.5800096421, -1.897785747, 3.190319704, 4.115562953]",
    )


def test_the_golden_values_of_grams() -> None:
    matches_golden(golden_path(chain(authors_adam(), C.grams), 3), THREE)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.99, 0.9)])
def test_cautious_atan2_is_the_packages(betas: tuple[float, float]) -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.scale_by_adam_atan2(betas=betas), C.cautious), begin, grads)
    theirs = walk(lambda ps: AdamAtan2(ps, 0.1, betas, cautious_factor=0.0), begin, grads)
    plain = walk(chain(C.scale_by_adam_atan2(betas=betas)), begin, grads)
    assert (ours[-1][1] - plain[-1][1]).abs().max() > 1e-2
    # kept entries are scaled up to 24-fold: updates are below 50
    same_path(ours, theirs, atol=bound(12, update=50, beta=0.99))


def test_cautious_lion_is_pytorch_optimizers_with_the_papers_scale() -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.scale_by_lion, C.cautious(scale="sum_plus_one")), begin, grads)
    theirs = walk(lambda ps: Lion(ps, 0.1, cautious=True), begin, grads)
    same_path(ours, theirs, atol=bound(12))


def test_grams_is_pytorch_optimizers() -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(chain(C.scale_by_adam(eps=1e-6), C.grams, weight_decay=0.1), begin, grads)
    theirs = walk(
        lambda ps: Grams(ps, 0.1, weight_decay=0.1, eps=1e-6, foreach=False), begin, grads
    )
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(12, beta=0.999))


ENTRY = st.sampled_from([0.0, -0.0, 1e-30, -1e-30, 1e-300, 0.5, -0.5, 2.0, -3.0])


@examples(60)
@given(
    pairs=st.lists(st.tuples(ENTRY, ENTRY), min_size=1, max_size=8),
    scale=st.sampled_from(["mean", "sum_plus_one", "none"]),
    strict=st.booleans(),
)
def test_the_mask_and_its_scale_are_those_of_a_loop(
    pairs: list[tuple[float, float]], scale: str, strict: bool
) -> None:
    update, grad = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))

    def sign(x: float) -> int:
        return (x > 0) - (x < 0)

    kept = [sign(u) * sign(g) > (0 if strict else -1) for u, g in pairs]
    factor = {
        "mean": 1 / max(sum(kept) / len(kept), 1e-3),
        "sum_plus_one": len(kept) / (sum(kept) + 1),
        "none": 1.0,
    }[scale]
    expected = [u * factor if k else 0.0 for (u, _), k in zip(pairs, kept, strict=True)]
    mask = C.cautious(scale=scale, strict=strict)
    (ours,) = updates([param_as_update, mask], [grad], update)
    close(ours, torch.tensor(expected, dtype=torch.float64), rtol=4 * EPS, atol=0.0)
    (grams,) = updates([param_as_update, C.grams], [grad], update)
    assert grams.tolist() == [sign(g) * abs(u) for u, g in pairs]


def test_a_tensor_that_disagrees_everywhere_gives_zero() -> None:
    grad = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for scale in ("mean", "sum_plus_one", "none"):
        (ours,) = updates([C.apply(fn=torch.neg), C.cautious(scale=scale)], [grad])
        assert ours.tolist() == [0.0, 0.0]


def test_the_mean_has_a_floor_of_a_thousandth() -> None:
    grad = torch.ones(5000, dtype=torch.float64)
    update = torch.full((5000,), -1.0, dtype=torch.float64)
    update[0] = 1.0
    (ours,) = updates([param_as_update, C.cautious], [grad], update)
    assert math.isclose(ours[0].item(), 1000.0, rel_tol=4 * EPS)
    assert not ours[1:].any()


@pytest.mark.parametrize("mask", ["cautious", "grams"])
def test_the_gradient_that_decides_is_the_raw_one(mask: str) -> None:
    grad = torch.tensor([[1.0, 2.0, 9.0], [-1.0, -2.0, -9.0]], dtype=torch.float64)
    # centralizing turns the sign of four entries, coupled decay that of all
    for change in (C.centralize, C.coupled(weight_decay=100.0)):
        start = -grad
        seen: list[torch.Tensor] = updates([change], [grad], start)
        flipped = seen[0].sign() != grad.sign()
        assert flipped.sum() >= 4
        (ours,) = updates([change, C.TRANSFORMS[mask]], [grad], start)
        if mask == "cautious":
            assert not ours[flipped].any()
        else:
            assert torch.equal(ours.sign(), grad.sign())


def test_one_entry_is_kept_whole_or_dropped() -> None:
    grads = [torch.tensor(x, dtype=torch.float64) for x in (1.0, -0.1)]
    ours = updates([C.exp_avg(beta=0.9), C.cautious], grads)
    plain = updates([C.exp_avg(beta=0.9)], grads)
    assert torch.equal(ours[0], plain[0])
    assert plain[1] > 0
    assert ours[1] == 0
