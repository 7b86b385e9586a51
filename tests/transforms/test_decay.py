"""Every decay in closed form under a changing learning rate, and against packages that have it."""

import math

import pytest
import torch
from adam_atan2_pytorch import AdamAtan2
from helpers import (
    EPS,
    anywhere,
    bound,
    chain,
    close,
    gradients,
    moves,
    same_path,
    set_lr,
    starts,
    walk,
    weighted_mean,
)
from pytorch_optimizer import AdamC

from heavyball import chainable as C
from heavyball.core.transform import Transform

RATES = [0.1, 0.3, 0.05, 0.3, 0.0, 0.2, 0.01]
WD = 0.4
STEPS = len(RATES)
ROUNDINGS = STEPS * EPS * 10 * 3  # ten roundings per step of numbers below 3


def peak(t: int) -> float:
    return max(RATES[: t + 1])


SHARES = {
    "decoupled": lambda t: WD * RATES[t],
    "independent": lambda t: WD * RATES[t] / peak(t),
    "adamc": lambda t: WD * RATES[t] ** 2 / peak(t),
    "palm_decay": lambda t: WD * RATES[t] ** 2,
}


@pytest.mark.parametrize("name", SHARES)
def test_without_a_gradient_the_weights_shrink_by_a_product(name: str) -> None:
    begin = starts()
    zero = [[torch.zeros_like(p) for p in begin]] * STEPS
    path = walk(chain(C.TRANSFORMS[name](weight_decay=WD)), begin, zero, set_lr(RATES))
    for t, step in enumerate(path):
        factor = math.prod(1 - SHARES[name](i) for i in range(t + 1))
        assert 0 < factor < 1
        for p, p0 in zip(step, begin, strict=True):
            close(p, p0 * factor, atol=ROUNDINGS)


@pytest.mark.parametrize("name", SHARES)
def test_with_gradients_each_step_is_decay_and_descent(name: str) -> None:
    begin, grads = starts(), gradients(STEPS)
    path = walk(chain(C.TRANSFORMS[name](weight_decay=WD)), begin, grads, set_lr(RATES))
    for t, step in enumerate(path):
        keep = [math.prod(1 - SHARES[name](i) for i in range(s, t + 1)) for s in range(t + 2)]
        for which, p in enumerate(step):
            pulls = (RATES[s] * keep[s + 1] * grads[s][which] for s in range(t + 1))
            close(p, keep[0] * begin[which] - sum(pulls), atol=bound(STEPS, lr=0.3))


@pytest.mark.parametrize("name", ["independent", "adamc"])
def test_a_given_peak_is_used_from_the_start(name: str) -> None:
    begin = starts()
    zero = [[torch.zeros_like(p) for p in begin]] * STEPS
    decay = C.TRANSFORMS[name](weight_decay=WD, peak_lr=0.5)
    path = walk(chain(decay), begin, zero, set_lr(RATES))
    power = 1 if name == "independent" else 2
    factor = math.prod(1 - WD * lr**power / 0.5 for lr in RATES)
    for p, p0 in zip(path[-1], begin, strict=True):
        close(p, p0 * factor, atol=ROUNDINGS)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("decoupled", lambda lr: WD * lr),
        ("independent", lambda lr: WD * lr / 0.2),
        ("adamc", lambda lr: WD * lr**2 / 0.2),
        ("palm_decay", lambda lr: WD * lr**2),
    ],
)
def test_warm_up_lowers_the_decay_but_not_the_peak(name: str, share: object) -> None:
    begin = starts()
    zero = [[torch.zeros_like(p) for p in begin]] * 5
    make = chain(C.TRANSFORMS[name](weight_decay=WD), lr=0.2, warmup_steps=4)
    factor = math.prod(1 - share(0.2 * min(1, t / 4)) for t in range(1, 6))
    for p, p0 in zip(walk(make, begin, zero)[-1], begin, strict=True):
        close(p, p0 * factor, atol=ROUNDINGS)


def test_l1_takes_the_same_off_every_weight() -> None:
    begin = [torch.tensor([5.0, -5.0, 0.0, 1.0], dtype=torch.float64)]
    zero = [[torch.zeros(4, dtype=torch.float64)]] * STEPS
    path = walk(chain(C.l1_decay(weight_decay=WD)), begin, zero, set_lr(RATES))
    taken = WD * torch.tensor(RATES, dtype=torch.float64).cumsum(0)
    for (p,), off in zip(path, taken, strict=True):
        close(p, begin[0] - off * begin[0].sign(), atol=STEPS * EPS * 10 * 5)


def test_cautious_decay_touches_only_what_also_moves_towards_zero() -> None:
    begin, grads = starts([(6, 5)]), gradients(STEPS, [(6, 5)])
    path = walk(chain(C.cautious_decay(weight_decay=WD)), begin, grads, set_lr(RATES))
    p = begin[0]
    for t, (new,) in enumerate(path):
        u = grads[t][0]
        agree = ~(((u > 0) & (p < 0)) | ((u < 0) & (p > 0)))
        assert 0 < agree.sum() < 30
        expected = torch.where(agree, p * (1 - RATES[t] * WD), p) - RATES[t] * u
        close(new, expected, atol=10 * EPS * 10)
        p = new


@pytest.mark.parametrize("compiled", [False, "auto"])
def test_cautious_decay_takes_the_entries_that_do_not_move(compiled: bool | str) -> None:
    p = torch.nn.Parameter(torch.tensor([2.0, -2.0, 0.0, 2.0, -2.0, 2.0, -2.0]))
    # the sign of a zero is no sign
    p.grad = torch.tensor([0.0, 0.0, 1.0, -0.0, -0.0, 1.0, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heavyball.utils.compile_mode", "auto")
        C.ChainOpt([p], 1.0, C.cautious_decay(weight_decay=0.5), compile=compiled).step()
    assert p.tolist() == [1.0, -1.0, -1.0, 1.0, -1.0, 0.0, -3.0]


def test_decay_to_the_mean_of_the_weights() -> None:
    begin, grads = starts(), gradients(STEPS)
    path = walk(chain(C.decay_to_ema(weight_decay=WD, beta=0.8)), begin, grads, set_lr(RATES))
    before = [begin, *path]
    for t, step in enumerate(path):
        for which, new in enumerate(step):
            past = [ps[which] for ps in before[: t + 1]]
            p, mean = past[-1], weighted_mean(past, 0.8)
            # at lr 0 nothing moves
            pull = WD * (mean - p) if RATES[t] else 0.0
            # the pull is divided by lr and multiplied by it again: wd / lr * |p - e| is below 200
            close(new, p + pull - RATES[t] * grads[t][which], atol=20 * EPS * 20)


def test_coupled_decay_is_part_of_the_gradient() -> None:
    begin, grads = starts(), gradients(STEPS)
    ours = walk(chain(C.coupled(weight_decay=WD), C.sign), begin, grads, set_lr(RATES))
    before = [begin, *ours]
    for t, step in enumerate(ours):
        for which, new in enumerate(step):
            p = before[t][which]
            close(new, p - RATES[t] * (grads[t][which] + WD * p).sign(), atol=4 * EPS * 10)


@pytest.mark.parametrize("name", [n for n, t in C.TRANSFORMS.items() if "weight_decay" in t.hyper])
def test_a_decay_never_grows_a_weight(name: str) -> None:
    transform = C.TRANSFORMS[name]
    begin = starts()
    zero = [[torch.zeros_like(p) for p in begin]] * 4
    for new, p in zip(
        walk(chain(anywhere(transform(weight_decay=0.1))), begin, zero)[-1], begin, strict=True
    ):
        assert (new.abs() <= p.abs()).all()
        assert torch.equal(new.sign(), p.sign())


def atan2_with(decay: Transform, weight_decay: float = 0.2) -> object:
    return chain(C.scale_by_adam_atan2, decay(weight_decay=weight_decay))


def test_decoupled_decay_is_torchs() -> None:
    begin, grads = starts(), gradients(9)
    ours = walk(chain(C.scale_by_adam, weight_decay=0.3), begin, grads)
    theirs = walk(lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.3), begin, grads)
    assert moves(ours, begin)
    same_path(ours, theirs, atol=bound(9, beta=0.999))


def test_cautious_decay_is_the_packages_of_atan2() -> None:
    begin, grads = starts(), gradients(10)
    theirs = walk(lambda ps: AdamAtan2(ps, 0.1, weight_decay=0.2, cautious_wd=True), begin, grads)
    # that package computes 1 - lr wd in float32, because its mask is, for weights below 5
    atol = bound(10, beta=0.99) + 10 * 2**-24 * 5
    same_path(walk(atan2_with(C.cautious_decay), begin, grads), theirs, atol)


def test_independent_decay_is_the_packages_of_atan2_under_a_schedule() -> None:
    begin, grads = starts(), gradients(7)
    rates = set_lr([0.1, 0.08, 0.05, 0.1, 0.02, 0.01, 0.03])
    theirs = walk(
        lambda ps: AdamAtan2(ps, 0.1, weight_decay=0.2, decoupled_wd=True), begin, grads, rates
    )
    same_path(walk(atan2_with(C.independent), begin, grads, rates), theirs, bound(7, beta=0.99))


def test_adamc_is_pytorch_optimizers_for_normalized_weights_under_a_schedule() -> None:
    begin, grads = starts(), gradients(7, least=1.0)
    rates = set_lr([0.1, 0.08, 0.05, 0.1, 0.02, 0.01, 0.03])
    theirs = walk(
        lambda ps: AdamC(
            [{"params": ps, "normalized": True}], 0.1, weight_decay=0.2, foreach=False
        ),
        begin,
        grads,
        rates,
    )
    adam = C.scale_by_adam(eps_placement="biased")
    ours = walk(chain(adam, C.adamc(weight_decay=0.2)), begin, grads, rates)
    # that package adds 1e-15 to the biased v, which is at least 1e-3 * 0.3^2
    same_path(ours, theirs, atol=bound(7, beta=0.999) + 7 * 0.1 * 10 * 0.5e-15 / 1e-3 / 0.09)
