"""schedule_free against the schedulefree package, its golden values, and x, y, z kept explicitly."""

import collections
from collections.abc import Callable

import pytest
import torch
from helpers import (
    EPS,
    bound,
    chain,
    close,
    e_grads,
    e_start,
    examples,
    golden_path,
    gradients,
    matches_golden,
    moves,
    of_one,
    same_path,
    set_lr,
    starts,
    walk,
)
from hypothesis import given
from hypothesis import strategies as st
from lion_pytorch import Lion
from pytorch_optimizer import LaProp
from schedulefree import (
    AdamWScheduleFree,
    AdamWScheduleFreeReference,
    RAdamScheduleFree,
    ScheduleFreeWrapperReference,
    SGDScheduleFree,
)
from torch import Tensor

from heavyball import chainable as C
from heavyball.core.transform import Transform

RATES = [0.1, 0.2, 0.05, 0.0, 0.1, 0.02, 0.15, 0.1, 0.3, 0.01, 0.1, 0.1]


def adam(beta2: float = 0.999, eps: float = 1e-8) -> Transform:
    """The direction of the authors' AdamW: no first moment."""
    return C.scale_by_exp_avg_sq(beta2=beta2, eps=eps)


def averages(
    make: Callable, begin: list[Tensor], grads: list, before: Callable | None = None
) -> list[list[Tensor]]:
    """x after every step, from the optimizer's own eval()."""
    found: list[list[Tensor]] = []
    made: list = []

    def watch(optimizer: torch.optim.Optimizer, t: int) -> None:
        made[:] = [optimizer]
        if t > 1:
            collect()
        if before is not None:
            before(optimizer, t)

    def collect() -> None:
        optimizer = made[0]
        optimizer.eval()
        found.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        optimizer.train()

    walk(make, begin, grads, watch)
    collect()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.2},
        {"warmup_steps": 5},
        {"r": 1.0},
        {"weight_lr_power": 0.0},
        {"weight_lr_power": 1.0, "r": 0.5, "warmup_steps": 3, "weight_decay": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_adamw_is_the_packages_at_y_and_at_x(betas: tuple[float, float], options: dict) -> None:
    begin, grads = starts(), gradients(12)
    own = {k: v for k, v in options.items() if k in ("r", "weight_lr_power")}
    rest = {k: v for k, v in options.items() if k not in own}
    ours = chain(adam(betas[1]), C.schedule_free(beta=betas[0], **own), **rest)

    def theirs(params: list) -> torch.optim.Optimizer:
        return AdamWScheduleFree(params, 0.1, betas, foreach=False, **options)

    schedule = set_lr(RATES)
    path = walk(ours, begin, grads, schedule)
    assert moves(path[4:], path[3])
    # decay feeds y back with a slope below 0.2 * 0.3 per step, less than doubled in twelve
    atol = 2 * bound(12, lr=0.3, beta=betas[1])
    same_path(path, walk(theirs, begin, grads, schedule), atol)
    # x = y + (1 - 1 / beta) (z - y) magnifies the differences of both by less than 4
    expected = averages(theirs, begin, grads, schedule)
    # the package's own switch to x and back costs it two roundings per step
    same_path(averages(ours, begin, grads, schedule), expected, 4 * atol + 12 * 4 * EPS * 10)


def test_the_simplified_reference_of_the_package_agrees() -> None:
    begin, grads = starts(), gradients(12)
    ours = walk(
        chain(adam(), C.schedule_free(r=0.5), weight_decay=0.1, warmup_steps=4), begin, grads
    )
    theirs = walk(
        lambda ps: AdamWScheduleFreeReference(ps, 0.1, weight_decay=0.1, warmup_steps=4, r=0.5),
        begin,
        grads,
    )
    same_path(ours, theirs, 2 * bound(12, beta=0.999))


@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
@pytest.mark.parametrize("momentum", [0.9, 0.3])
def test_sgd_is_the_packages(momentum: float, weight_decay: float) -> None:
    begin, grads = starts(), gradients(12)
    ours = chain(C.schedule_free(beta=momentum), weight_decay=weight_decay, warmup_steps=3)
    theirs = walk(
        lambda ps: SGDScheduleFree(ps, 0.1, momentum, weight_decay, warmup_steps=3, foreach=False),
        begin,
        grads,
    )
    same_path(walk(ours, begin, grads), theirs, 2 * bound(12))


class Wrapper(ScheduleFreeWrapperReference):
    """The package's wrapper with its z, x and y apart from the state of the optimizer in it, which
    would take them for its own."""

    def __init__(self, *args: object, **options: object):
        self.points: dict = collections.defaultdict(dict)
        super().__init__(*args, **options)

    @property
    def state(self) -> dict:
        return self.points


BASES = {
    "scale_by_adam": lambda ps: torch.optim.AdamW(ps, 0.1, weight_decay=0.0),
    "heavyball_momentum": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    "scale_by_lion": lambda ps: Lion(ps, 0.1),
    "scale_by_rms": lambda ps: torch.optim.RMSprop(ps, 0.1),
    "scale_by_laprop": lambda ps: LaProp(ps, 0.1, foreach=False),
}


@pytest.mark.parametrize("name", BASES)
def test_any_direction_is_that_optimizer_in_the_packages_wrapper(name: str) -> None:
    begin, grads = starts(), gradients(10, least=1.0)
    ours = walk(chain(C.TRANSFORMS[name], C.schedule_free, weight_decay=0.1), begin, grads)
    theirs = walk(lambda ps: Wrapper(BASES[name](ps), 0.9, weight_decay_at_y=0.1), begin, grads)
    assert moves(ours, begin)
    # LaProp of pytorch_optimizer adds 1e-15 to v, see test_laprop
    laprop = 10 * 0.1 * 10 * 0.5e-15 / 1e-3 / 0.09
    same_path(ours, theirs, 2 * bound(10, update=100, beta=0.999) + laprop)


def test_the_golden_values_of_adamw() -> None:
    optimizers = []

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizers.append(
            chain(adam(0.99), C.schedule_free, weight_decay=0.01, warmup_steps=2)(params)
        )
        return optimizers[0]

    matches_golden(
        golden_path(make, 3),
        """[0.9495000006, -2.048999993, 3.048499999, 4.047999999]
        | [0.8667214115, -1.932088409, 3.075573308, 3.960987716]
        | [0.8082120915, -1.854205682, 3.010698184, 4.001886952]""",
    )
    (state,) = optimizers[0].state.values()
    optimizers[0].eval()
    matches_golden(
        [state["schedule_free.z"], optimizers[0].param_groups[0]["params"][0]],
        """[0.7476837814, -1.773471454, 2.946483384, 4.040663937]
        | [0.8149374592, -1.863176152, 3.017833161, 3.997578398]""",
    )
    assert state["schedule_free.weight_sum"].item() == pytest.approx(0.0225, rel=4 * EPS)
    assert state["schedule_free.lr_max"].item() == 0.1


def test_the_golden_values_of_sgd() -> None:
    optimizers = []

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        optimizers.append(chain(C.schedule_free(beta=0.9))(params))
        return optimizers[0]

    matches_golden(
        golden_path(make, 3),
        """[0.9122417438, -2.00707372, 3.080114362, 4.093645669]
        | [0.8639747029, -1.963010821, 3.091708131, 4.039933349]
        | [0.815707662, -1.9135354, 3.055806562, 4.065171421]""",
    )
    (state,) = optimizers[0].state.values()
    optimizers[0].eval()
    matches_golden(
        [state["schedule_free.z"], optimizers[0].param_groups[0]["params"][0]],
        """[0.7367252314, -1.83331369, 3.003535179, 4.095704122]
        | [0.8244834876, -1.922448923, 3.061614494, 4.061778899]""",
    )


def test_the_golden_values_of_radam_are_a_schedule_of_the_lr() -> None:
    # rect of RAdam at beta2 0.99: silent for four steps, then a warm-up
    infinite = 2 / (1 - 0.99) - 1

    def rect(t: int) -> float:
        rho = infinite - 2 * t * 0.99**t / (1 - 0.99**t)
        top = (rho - 4) * (rho - 2) * infinite
        return (top / ((infinite - 4) * (infinite - 2) * rho)) ** 0.5 if rho > 4 else 0.0

    rates = [0.1 * rect(t) for t in range(1, 8)]
    path = golden_path(chain(adam(0.99), C.schedule_free), 7, set_lr(rates))
    for p in path[:4]:
        assert torch.equal(p, e_start())
    matches_golden(
        path[4:],
        """[0.9945528957, -2.005993125, 3.00388446, 4.005450996]
        | [0.988647911, -2.014092418, 2.995857674, 3.999739356]
        | [0.9814963332, -2.018807941, 2.997294196, 4.004065579]""",
    )
    theirs = walk(
        lambda ps: RAdamScheduleFree(ps, 0.1, (0.9, 0.99), foreach=False),
        [e_start()],
        of_one(e_grads(7)),
    )
    same_path(of_one(path), theirs, bound(7, beta=0.99))


class ByHand:
    """x, y and z kept apart, x as the weighted mean of every z so far and y made of both."""

    def __init__(self, start: Tensor, beta: float, r: float, power: float, c: float):
        self.z = self.y = self.x = start
        self.beta, self.r, self.power, self.c = beta, r, power, c
        self.rates: list[float] = []
        self.zs: list[Tensor] = []
        self.weights: list[float] = []

    def step(self, direction: Tensor, lr: float) -> Tensor:
        self.rates.append(lr)
        self.z = self.z - lr * direction
        self.zs.append(self.z)
        self.weights.append(len(self.rates) ** self.r * max(self.rates) ** self.power)
        total = sum(self.weights)
        if self.c:
            share = min(1.0, self.c * (1 - self.beta) * self.weights[-1] / total)
            self.x = (1 - share) * self.x + share * self.z
        elif total:
            self.x = sum(w * z for w, z in zip(self.weights, self.zs, strict=True)) / total
        self.y = (1 - self.beta) * self.z + self.beta * self.x
        return self.y


@examples(25)
@given(
    beta=st.sampled_from([0.1, 0.5, 0.9, 0.98]),
    r=st.sampled_from([0.0, 1.0, 2.5]),
    power=st.sampled_from([0.0, 1.0, 2.0]),
    c=st.sampled_from([0.0, 0.5, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_y_and_x_are_those_of_three_separate_sequences(
    beta: float, r: float, power: float, c: float, seed: int
) -> None:
    (start,), grads = starts([(3, 4)], seed), [g for (g,) in gradients(12, [(3, 4)], seed)]
    ours = chain(C.schedule_free(beta=beta, r=r, weight_lr_power=power, c=c))
    schedule = set_lr(RATES)
    path = walk(ours, [start], of_one(grads), schedule)
    means = averages(ours, [start], of_one(grads), schedule)
    hand = ByHand(start, beta, r, power, c)
    for t, g in enumerate(grads):
        expected = hand.step(g, RATES[t])
        atol = 2 * bound(12, lr=0.3, param=20)
        close(path[t][0], expected, atol=atol)
        # x is found from y and z with the factor 1 / beta - 1 on their differences
        close(means[t][0], hand.x, atol=2 * atol / beta)


def test_both_identities_of_the_average_hold() -> None:
    (start,), grads = starts([(3, 4)]), [g for (g,) in gradients(10, [(3, 4)])]
    param = torch.nn.Parameter(start.clone())
    optimizer = C.ChainOpt([param], 0.1, adam(), C.schedule_free(beta=0.8))
    x, weights = start, 0.0
    for t, g in enumerate(grads):
        set_lr(RATES)(optimizer, t + 1)
        param.grad = g.clone()
        optimizer.step()
        z = optimizer.state[param]["schedule_free.z"]
        weight = max(RATES[: t + 1]) ** 2
        weights += weight
        share = weight / weights
        with optimizer.averaged():
            now = param.detach().clone()
        close(now, (1 - share) * x + share * z, atol=2 * bound(10, lr=0.3, beta=0.999))
        close(now, param + (1 - 1 / 0.8) * (z - param), atol=8 * EPS * 10)
        x = now
    assert (x - start).abs().max() > 0.1


def test_an_average_is_never_longer_than_the_last_point() -> None:
    """c_t is at most 1: where c asks for more, x is z, and so is y."""
    begin, grads = starts(), gradients(8)
    beta, large = 0.5, 40.0
    free = walk(chain(C.schedule_free(beta=beta, c=large), lr=0.1), begin, grads)
    plain = walk(chain(C.descend, lr=0.1), begin, grads)
    for one, other in zip(free, plain, strict=True):
        for y, z in zip(one, other, strict=True):
            close(y, z, atol=40 * EPS)


def test_the_first_step_puts_all_three_points_together() -> None:
    (start,), (grad,) = starts([(3, 4)]), [g for (g,) in gradients(1, [(3, 4)])]
    param = torch.nn.Parameter(start.clone())
    optimizer = C.ChainOpt([param], 0.1, C.schedule_free)
    param.grad = grad
    optimizer.step()
    y, z = param.detach().clone(), optimizer.state[param]["schedule_free.z"].clone()
    optimizer.eval()
    for point in (y, z, param.detach()):
        close(point, start - 0.1 * grad, atol=20 * EPS)


def test_a_learning_rate_of_zero_moves_nothing_and_a_later_one_starts_as_new() -> None:
    begin, grads = starts(), gradients(6)
    path = walk(chain(C.schedule_free), begin, grads, set_lr([0.0, 0.0, 0.0, 0.1, 0.1, 0.1]))
    for step in path[:3]:
        assert all(torch.equal(a, b) for a, b in zip(step, begin, strict=True))
    same_path(path[3:], walk(chain(C.schedule_free), begin, grads[3:]), 2 * bound(3))


def test_falling_rates_are_weighed_by_the_largest_so_far() -> None:
    begin, grads = starts(), gradients(8)
    schedule = set_lr([0.4 / 2**t for t in range(8)])
    path = walk(chain(C.schedule_free(beta=0.9)), begin, grads, schedule)
    hands = [ByHand(p, 0.9, 0.0, 2.0, 0.0) for p in begin]
    for t, step in enumerate(path):
        for hand, p, g in zip(hands, step, grads[t], strict=True):
            close(p, hand.step(g, 0.4 / 2**t), atol=2 * bound(8, lr=0.4))
    # equal weights, so the average is the plain mean of z_1 .. z_8 and not nearly z_1
    close(hands[1].x, sum(hands[1].zs) / 8, atol=8 * EPS * 10)


@pytest.mark.parametrize("caution", ["none", "cautious", "grams"])
def test_caution_is_about_the_whole_change_of_y_and_never_about_z(caution: str) -> None:
    (start,), grads = starts([(4, 6)]), [g for (g,) in gradients(12, [(4, 6)])]
    param = torch.nn.Parameter(start.clone())
    writer = C.schedule_free(beta=0.9, caution=caution)
    optimizer = C.ChainOpt([param], 0.1, adam(0.9, 0.1), writer, weight_decay=0.3)
    y = z = start
    square, total, masked = 0.0, 0.0, 0
    for t, g in enumerate(grads, start=1):
        param.grad = g.clone()
        optimizer.step()
        square = 0.9 * square + 0.1 * g**2
        d = g / ((square / (1 - 0.9**t)).sqrt() + 0.1) + 0.3 * y
        total += 0.01
        c = 0.01 / total
        change = c * (y - z) + 0.1 * (1 - 0.9 * (1 - c)) * d
        keep = d * change > 0
        masked += int((~keep).sum())
        if caution == "cautious":
            change = torch.where(keep, change, 0.0) * (24 / keep.sum().item())
        elif caution == "grams":
            change = torch.copysign(change, d)
        y, z = y - change, z - 0.1 * d
        # the mask can scale a change up to 24-fold
        close(param.detach(), y, atol=24 * bound(12, beta=0.9))
        close(optimizer.state[param]["schedule_free.z"], z, atol=24 * bound(12, beta=0.9))
    assert masked > 5


def test_cautious_before_it_masks_the_direction_of_y_and_z_alike() -> None:
    begin, grads = starts([(4, 6)]), gradients(10, [(4, 6)])
    masked = walk(chain(C.exp_avg, C.cautious, C.schedule_free), begin, grads)
    hand = ByHand(begin[0], 0.9, 0.0, 2.0, 0.0)
    m = 0.0
    for t, ((p,), (g,)) in enumerate(zip(masked, grads, strict=True), start=1):
        m = 0.9 * m + 0.1 * g
        keep = m * g > 0
        direction = torch.where(keep, m, 0.0) / (1 - 0.9**t) * (24 / keep.sum().item())
        close(p, hand.step(direction, 0.1), atol=2 * bound(10, update=240, beta=0.9))


def test_a_late_parameter_is_averaged_from_its_own_first_step() -> None:
    begin, grads = starts([(3,), (2, 2)]), gradients(8, [(3,), (2, 2)])
    late = [[g[0], None if t < 3 else g[1]] for t, g in enumerate(grads)]
    make = chain(adam(), C.schedule_free(r=1.0), warmup_steps=4)
    path = walk(make, begin, late)
    alone = walk(make, begin[1:], [[g[1]] for g in grads[3:]])
    for (_, p), (other,) in zip(path[3:], alone, strict=True):
        assert torch.equal(p, other)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [{}, {"c": 2.0, "r": 1.0}], ids=str)
def test_a_changing_beta_moves_y_and_leaves_the_average(compile: bool, options: dict) -> None:
    """x, y and z kept explicitly, with a beta that cycles as OneCycleLR does it."""
    betas = [0.95, 0.95, 0.9, 0.85, 0.6, 0.85, 0.95, 0.95]
    grads = [torch.randn(7, generator=torch.Generator().manual_seed(t)).double() for t in range(8)]
    p = torch.nn.Parameter(torch.linspace(-1, 1, 7).double())
    elements = (C.sign, C.schedule_free(**options))
    opt = C.ChainOpt([p], 0.1, *elements, compile=compile, weight_decay=0.0)
    x = z = p.detach().clone()
    total = 0.0
    for t, (beta, grad) in enumerate(zip(betas, grads, strict=True)):
        opt.param_groups[0]["beta"] = beta
        p.grad = grad.clone()
        opt.step()
        weight = (t + 1) ** options.get("r", 0.0) * 0.1**2
        total += weight
        share = weight / total
        if "c" in options:
            share = min(1.0, options["c"] * (1 - beta) * share)
        z = z - 0.1 * grad.sign()
        x = (1 - share) * x + share * z
        torch.testing.assert_close(p.detach(), (1 - beta) * z + beta * x, rtol=1e-12, atol=1e-12)
        for other in (beta, 0.3):  # of a step that is not taken
            opt.param_groups[0]["beta"] = other
            with opt.averaged():
                torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)


def test_the_weights_of_one_cycle_are_averages() -> None:
    p = torch.nn.Parameter(torch.zeros(3).double())
    opt = C.ChainOpt([p], 0.1, C.sign, C.schedule_free(weight_lr_power=0.0), compile=False)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=0.1, total_steps=40, cycle_momentum=False
    )
    mean = torch.zeros(3).double()
    for t in range(39):
        opt.param_groups[0]["beta"] = 0.95 - 0.1 * (t < 20) * t / 20
        p.grad = torch.tensor([1.0, -1.0, (-1.0) ** t]).double()
        opt.step()
        schedule.step()
        mean += (opt.state[p]["schedule_free.z"] - mean) / (t + 1)
        with opt.averaged():
            torch.testing.assert_close(p.detach(), mean, rtol=1e-10, atol=1e-12)
