"""A step that a gate leaves out changes nothing behind it, whatever a rate does in front of it."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import clones, same_bits
from torch import Tensor

from heavyball import chainable as C
from heavyball.core.program import Node

PERIOD = 3


@C.transform(provides=("gate",))
def some_steps(update: Tensor, *, step: Tensor) -> tuple[Tensor, Tensor]:
    """Leave out every third step."""
    return update, torch.remainder(step, PERIOD) != 0


@C.whole_transform(provides=("gate",))
def some_steps_on_the_host(update: Tensor, *, count: int) -> tuple[Tensor, bool]:
    """The same, decided on the host."""
    return update, count % PERIOD != 0


RATES = {
    "prodigy": C.prodigy_d(d0=1e-2),
    "plus": C.prodigy_plus_d(d0=1e-2),
    "progress": C.prodigy_progress_d(d0=1e-2),
}
GATES = {"device": some_steps, "host": some_steps_on_the_host}


def spots(rate: Any, gate: Any) -> Iterator[tuple[Any, ...]]:
    """Chains with the gate in every spot, in branches as well."""
    elements = (C.scale_by_adam, C.exp_avg, C.scale_by_exp_avg_sq)
    for place in range(len(elements) + 1):
        yield (rate, *elements[:place], gate, *elements[place:])
    yield (rate, C.exp_avg, gate, C.scale_by_adam, gate, C.exp_avg)
    if gate is some_steps:
        for join in (C.parallel, C.graft):
            yield (rate, join((gate, C.exp_avg), C.scale_by_adam), C.exp_avg)
            yield (rate, join(C.exp_avg, (C.exp_avg, gate, C.scale_by_adam)), C.scale_by_exp_avg_sq)


def behind(opt: C.ChainOpt) -> set[str]:
    """The keys of the state of what stands behind the first gate; of all where one is in a branch."""
    nodes = list(opt.chain.programs[0].nodes)
    gated = [
        i for i, n in enumerate(nodes) if isinstance(n, Node) and "gate" in n.transform.provides
    ]
    first = (
        gated[0] + 1 if gated else next(i for i, n in enumerate(nodes) if not isinstance(n, Node))
    )
    after = [n if isinstance(n, Node) else n.merge for n in nodes[first + (not gated) :]]
    return {n.state_key(name) for n in after for name in n.transform.states}


CASES = [
    (rate, gate, number)
    for rate, gate in itertools.product(RATES, GATES)
    for number, _ in enumerate(spots(RATES[rate], GATES[gate]))
    if rate == "prodigy" or number in (1, 5)
]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(("rate", "gate", "number"), CASES)
def test_a_step_that_is_left_out_changes_no_bit_behind_the_gate(
    rate: str, gate: str, number: int, compile: bool
) -> None:
    chain = next(itertools.islice(spots(RATES[rate], GATES[gate]), number, None))
    param = torch.nn.Parameter(torch.linspace(-1, 1, 12).reshape(4, 3))
    opt = C.ChainOpt([param], 1.0, *chain, compile=compile)
    keys = behind(opt)
    made = torch.Generator().manual_seed(number)
    for step in range(1, 3 * PERIOD + 1):
        param.grad = param.detach() + 0.1 * torch.randn(4, 3, generator=made)
        before, weights = {k: v.clone() for k, v in opt.state[param].items()}, clones([param])
        opt.step()
        kept = {
            key for key in keys & before.keys() if same_bits(opt.state[param][key], before[key])
        }
        if step % PERIOD == 0:
            assert kept == keys & before.keys()
            assert same_bits(param.detach(), weights[0])
        else:
            assert not kept - {key for key in keys if key.endswith("moment_unit")}
            assert not same_bits(param.detach(), weights[0])


# ---- in the right unit afterwards


def doubled(members: Any, options: Any) -> list[dict[str, Any]]:
    return [{"scale": 2 * m.values["scale"]} for m in members]


@C.rate(
    unit=C.scalar(0.0),
    numbers={"scale": 1.0},
    gives=("nothing",),
    finish=doubled,
    provides=("change", "scale_now"),
    moment_unit="scale_now",
    moment_change="change",
)
def doubling(update: Tensor, unit: Tensor, *, scale: Tensor) -> tuple[Tensor, ...]:
    """A unit that doubles in every step."""
    change = torch.where(unit > 0, unit / scale, 1.0)
    return update, scale, change, scale, torch.zeros_like(scale)


@pytest.mark.parametrize("compile", [False, True])
# one branch alone cannot end a step on the host
@pytest.mark.parametrize(("gate", "branch"), [("device", False), ("device", True), ("host", False)])
def test_a_moment_behind_a_gate_catches_up(gate: str, branch: bool, compile: bool) -> None:
    """m <- m unit / scale + w (1 - m unit / scale) in the steps that go through."""
    gates = (C.parallel(GATES[gate], C.sign, weights=(1.0, 0.0)),) if branch else (GATES[gate],)
    param = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    opt = C.ChainOpt([param], 1.0, doubling, *gates, C.exp_avg(beta=0.5), compile=compile)
    mean, unit = 0.0, 1.0
    for step in range(1, 10):
        param.grad = torch.ones_like(param)
        opt.step()
        if step % PERIOD:
            scale = 2.0 ** (step - 1)
            mean *= unit / scale
            mean += 0.5 / (1 - 0.5**step) * (1 - mean)
            unit = scale
        torch.testing.assert_close(opt.state[param]["exp_avg"], torch.full_like(param, mean))


# ---- and nowhere else


def test_what_keeps_the_unit_is_not_an_element_of_the_chain() -> None:
    chain = (C.prodigy_d, C.scale_by_adam, C.accumulate(k=2), C.exp_avg)
    param = torch.nn.Parameter(torch.ones(3))
    opt = C.ChainOpt([param], 1.0, *chain)
    param.grad = torch.ones(3)
    opt.step()
    assert (
        repr(opt.chain)
        == "prodigy_d | scale_by_adam | accumulate(k=2) | exp_avg | decoupled | descend"
    )
    assert "own_unit" not in str(opt.state_dict()["heavyball"])
    assert opt.state[param]["accumulate.moment_unit"].numel() == 1


@pytest.mark.parametrize(
    "chain",
    [
        (C.prodigy_d, C.scale_by_adopt, C.exp_avg),
        (C.prodigy_plus_d, C.delayed_rms, C.exp_avg),
        (C.prodigy_d, C.soap_precond(), C.exp_avg),
        (C.prodigy_d, C.scale_by_adam, C.accumulate(k=2), C.sign),
        (C.skip_not_finite, C.prodigy_d, C.scale_by_adam),
        (C.accumulate(k=2), C.prodigy_d, C.scale_by_adam),
        (C.scale_by_adam, C.accumulate(k=2), C.exp_avg),
    ],
    ids=repr,
)
def test_where_nothing_can_lose_its_unit_no_bytes_are_spent(chain: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3, 2))
    opt = C.ChainOpt([param], 1.0, *chain)
    param.grad = torch.ones(3, 2)
    opt.step()
    assert not [key for key in opt.state[param] if key.endswith("moment_unit")]
