"""Training that goes on with another number of processes equals training that never stopped."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import eager  # noqa: F401, kernels are tried where they matter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distributed import processes
from distributed.engines import OPTIMIZERS, Model, give, whole

STEPS = 2


def _train(rank: int, world: int, first: int, names: list[str], folder: str, flat: bool) -> dict:
    found = {}
    for name in names:
        model = Model()
        if world > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        opt = OPTIMIZERS[name](list(model.named_parameters()))
        place = Path(folder) / str(list(OPTIMIZERS).index(name))
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        if first:
            opt.init_state()
            state = {
                "model": get_model_state_dict(model),
                "opt": get_optimizer_state_dict(model, opt, options=options),
            }
            dcp.load(state, checkpoint_id=place / str(first))
            set_model_state_dict(model, state["model"])
            set_optimizer_state_dict(model, opt, state["opt"], options=options)
        for step in range(first, first + STEPS):
            give(model, step)
            opt.step()
        opt.zero_grad()
        state = {
            "model": get_model_state_dict(model),
            "opt": get_optimizer_state_dict(model, opt, options=options),
        }
        dcp.save(state, checkpoint_id=place / str(first + STEPS))
        found[name] = [whole(p) for p in model.parameters()]
    return found


def _never_stopped(names: list[str], steps: int) -> dict[str, Any]:
    found = {}
    for name in names:
        model = Model()
        opt = OPTIMIZERS[name](list(model.named_parameters()))
        for step in range(steps):
            give(model, step)
            opt.step()
        found[name] = [whole(p) for p in model.parameters()]
    return found


# those whose state is of another kind than that of one before
KINDS = (
    *("AdamW", "SFAdamW", "FactoredAdamW", "ADOPT", "Prodigy", "ProdigyPlusScheduleFree", "SOAP"),
    *("PSGDKron", "LATHER", "Muon", "NorMuon", "Shampoo", "8-bit AdamW"),
)


@pytest.mark.parametrize("flat", [False, True])
def test_one_then_two_then_three_then_one(tmp_path: Path, flat: bool) -> None:
    names = list(KINDS)[:: 4 if flat else 1]
    expected = _never_stopped(names, 4 * STEPS)
    for first, world in ((0, 1), (2, 2), (4, 3), (6, 1)):
        found = processes.run(world, _train, world, first, names, str(tmp_path), flat)
    for name in names:
        start = list(Model().parameters())
        for a, b, c in zip(found[0][name], expected[name], start, strict=True):
            assert (a - b).abs().max() <= 1e-9 * (b - c).abs().max(), name


def _full(rank: int, name: str, offload: bool) -> Any:
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    opt = OPTIMIZERS[name](list(model.named_parameters()))
    for step in range(STEPS):
        give(model, step)
        opt.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    saved = get_optimizer_state_dict(model, opt, options=options)
    # it goes back as it came
    other = Model()
    fully_shard(other, mesh=init_device_mesh("cpu", (3,)))
    again = OPTIMIZERS[name](list(other.named_parameters()))
    again.init_state()
    if not offload:
        set_optimizer_state_dict(other, again, saved, options=options)
        back = get_optimizer_state_dict(other, again, options=options)
        for key, state in saved["state"].items():
            for entry, tensor in state.items():
                assert torch.equal(back["state"][key][entry], tensor), (key, entry)
    return saved.get("state")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["SOAP", "AdamW", "ProdigyPlusScheduleFree"])
def test_a_full_state_dict_is_that_of_one_process(name: str, offload: bool) -> None:
    found = processes.run(3, _full, name, offload)[0]
    model = Model()
    opt = OPTIMIZERS[name](list(model.named_parameters()))
    for step in range(STEPS):
        give(model, step)
        opt.step()
    expected = get_optimizer_state_dict(model, opt)["state"]
    assert found.keys() == expected.keys()
    for param, state in expected.items():
        assert list(found[param]) == list(state)
        for key, tensor in state.items():
            assert found[param][key].shape == tensor.shape
            torch.testing.assert_close(found[param][key], tensor, rtol=1e-6, atol=1e-9)
