"""Training that goes on with another number of processes equals training that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    QUICK,
    eager,  # noqa: F401, kernels are tried where they matter
)
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed import processes
from distributed.engines import OPTIMIZERS, Few, give, mesh_of, wholes

STEPS = 2


def _train(
    rank: int, world: int, first: int, names: list[str], folder: str, given: dict[str, bool]
) -> dict:
    several, found = {name: _placed(name, world) for name in names}, {}
    options = StateDictOptions(**given)
    if first:
        for _, opt in several.values():
            opt.init_state()
        states = _states(several, options)
        dcp.load(states, checkpoint_id=Path(folder) / str(first))
        for name, (model, opt) in several.items():
            set_model_state_dict(model, states[name]["model"])
            set_optimizer_state_dict(model, opt, states[name]["opt"], options=options)
    for name, (model, opt) in several.items():
        for step in range(first, first + STEPS):
            give(model, step)
            opt.step()
        opt.zero_grad()
        found[name] = wholes([*model.parameters()])
    if first < 6:
        dcp.save(_states(several, options), checkpoint_id=Path(folder) / str(first + STEPS))
    return found


def _placed(name: str, world: int) -> tuple[Few, Any]:
    model = Few()
    if world > 1:
        fully_shard(model, mesh=mesh_of(world))
    return model, OPTIMIZERS[name](list(model.named_parameters()))


def _states(several: dict[str, tuple[Few, Any]], options: StateDictOptions) -> dict[str, Any]:
    """What a checkpoint of several models has."""
    return {
        name: {
            "model": get_model_state_dict(model),
            "opt": get_optimizer_state_dict(model, opt, options=options),
        }
        for name, (model, opt) in several.items()
    }


def _never_stopped(names: list[str], steps: int) -> dict[str, Any]:
    found = {}
    for name in names:
        model = Few()
        opt = OPTIMIZERS[name](list(model.named_parameters()))
        for step in range(steps):
            give(model, step)
            opt.step()
        found[name] = wholes([*model.parameters()])
    return found


# those whose state is of another kind than that of one before
KINDS = (
    *("AdamW", "SFAdamW", "FactoredAdamW", "ADOPT", "Prodigy", "ProdigyPlusScheduleFree", "SOAP"),
    *("PSGDKron", "LATHER", "Muon", "NorMuon", "Shampoo", "8-bit AdamW"),
)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat and offloaded"])
def test_one_then_two_then_three_then_one(tmp_path: Path, flat: bool) -> None:
    rest = [name for name in OPTIMIZERS if name not in KINDS]
    # in `make test` each kind goes one of the two ways
    names = [*KINDS[flat::2]] if QUICK else [*KINDS, *rest[flat::2]]
    options = {"flatten_optimizer_state_dict": flat, "cpu_offload": flat}
    expected = _never_stopped(names, 4 * STEPS)
    for first, world in ((0, 1), (2, 2), (4, 3), (6, 1)):
        found = processes.run(world, _train, world, first, names, str(tmp_path), options)
    for name in names:
        start = list(Few().parameters())
        for a, b, c in zip(found[0][name], expected[name], start, strict=True):
            assert (a - b).abs().max() <= 1e-9 * (b - c).abs().max(), name


# ---- whole


def _cut(rank: int) -> Few:
    model = Few()
    fully_shard(model, mesh=mesh_of(3))
    return model


def _full(rank: int, names: list[str]) -> dict[str, Any]:
    """Full dicts of shards, nested and flat, loaded by all and from the first process."""
    found = {}
    for name in names:
        model = _cut(rank)
        opt = OPTIMIZERS[name](list(model.named_parameters()))
        for step in range(STEPS):
            give(model, step)
            opt.step()
        opt.zero_grad()
        expected = opt.state_dict()["state"]
        whole_of = StateDictOptions(full_state_dict=True)
        found[name] = get_optimizer_state_dict(model, opt, options=whole_of)["state"]
        first = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
        flat = StateDictOptions(full_state_dict=True, flatten_optimizer_state_dict=True)
        # torch itself cannot load a flat dict as a full one; it is taken as it is
        another = (whole_of, whole_of), (flat, StateDictOptions(flatten_optimizer_state_dict=True))
        for saving, loading in ((first, first), another[names.index(name) % 2]):
            saved = get_optimizer_state_dict(model, opt, options=saving)
            assert bool(saved) == (saving is not first or rank == 0)
            other = _cut(rank)
            again = OPTIMIZERS[name](list(other.named_parameters())).init_state()
            set_optimizer_state_dict(other, again, saved, options=loading)
            _equal(again.state_dict()["state"], expected, name)
    return found


def _equal(found: dict, expected: dict, name: str) -> None:
    assert found.keys() == expected.keys()
    for number, state in expected.items():
        assert found[number].keys() == state.keys(), (name, number)
        for key, tensor in state.items():
            other = found[number][key]
            assert type(other) is type(tensor), (name, number, key)
            assert torch.equal(_here(other), _here(tensor)), (name, number, key)


def _here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def test_full_state_dicts_are_those_of_one_process() -> None:
    names = list(KINDS[::2] if QUICK else KINDS)
    found = processes.run(3, _full, names)
    for name in names:
        model = Few()
        opt = OPTIMIZERS[name](list(model.named_parameters()))
        for step in range(STEPS):
            give(model, step)
            opt.step()
        alone = get_optimizer_state_dict(model, opt)["state"]
        for of in found:
            assert of[name].keys() == alone.keys()
            for param, state in alone.items():
                assert list(of[name][param]) == list(state)
                for key, tensor in state.items():
                    other = of[name][param][key]
                    assert other.shape == tensor.shape, (name, key)
                    if tensor.is_floating_point():  # others are codes, a rounding apart
                        torch.testing.assert_close(other, tensor, rtol=1e-6, atol=1e-9)
        # and it is loaded there
        saved = {"state": found[0][name], "param_groups": opt.state_dict()["param_groups"]}
        saved["param_groups"][0]["params"] = list(alone)
        opt.load_state_dict(saved)


def _keys(rank: int) -> list[list[str]]:
    model = _cut(rank)
    opt = OPTIMIZERS["SOAP"](list(model.named_parameters()))
    give(model, 0)
    opt.step()
    return [list(opt.state[p]) for p in model.parameters()]


def test_every_process_shows_the_same_keys() -> None:
    """State of an owner has an entry without elements elsewhere: flat dicts are read by these keys."""
    one, *others = processes.run(3, _keys)
    for other in others:
        assert [set(keys) for keys in other] == [set(keys) for keys in one]
