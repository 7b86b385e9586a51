"""What kernels are given addresses of: the right memory, of the right size, or a refusal by name."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import assert_same_optimizers, clones, differences, snapshot
from test_staging import (
    channels_last,
    every_other,
    sliced,
    sliced_and_transposed,
    transposed,
    values,
)
from torch.distributed.tensor import DTensor
from torch.testing._internal.two_tensor import TwoTensor

import heavyball
from heavyball import chainable as C

bf16 = torch.bfloat16

# ---- steps inside backward() over parameters that kernels see as copies

LAYOUTS = [channels_last, transposed, sliced, every_other, sliced_and_transposed]
RULES = {
    "FactoredAdamW": partial(heavyball.FactoredAdamW, min_dim=2),
    "agc": partial(heavyball.AdamW, gradient_clipping="agc"),
    "schedule-free": partial(heavyball.SFAdamW, caution=True),
    "correction": partial(heavyball.AdamW, ecc="bf16+8"),
    "rows": lambda params, lr, **how: C.ChainOpt(params, lr, C.centralize, C.exp_avg, **how),
}


def pulled(rule, layout, way):
    dtype = bf16 if rule == "schedule-free" else torch.float32
    p = torch.nn.Parameter(layout(values((4, 6, 5, 3), 0)).to(dtype))
    p.data = layout(p.data)
    opt = RULES[rule]([p], lr=1e-2, fuse_backward=way == "fuse_backward")
    for step in range(5):
        pull = values(p.shape, step + 1).to(dtype)
        # gradients in the parameter's order, and in another
        (p * pull if step % 2 else p.contiguous() * pull).sum().backward()
        if way == "step_parameter":
            opt.step_parameter(p)
        else:
            opt.step()
            opt.zero_grad()
    return opt


@pytest.mark.parametrize("rule", RULES)
def test_a_parameter_that_is_copied_is_stepped_alike_inside_backward(rule: str) -> None:
    for layout in LAYOUTS:
        want = pulled(rule, layout, "step")
        for way in ("fuse_backward", "step_parameter"):
            assert_same_optimizers(pulled(rule, layout, way), want)


@pytest.mark.parametrize("name", ["AdamW", "FactoredAdamW"])
@pytest.mark.parametrize("dtypes", [(torch.float32, bf16), (bf16, torch.float32)], ids=str)
def test_a_gradient_that_changes_its_dtype_is_read_as_what_it_is(name, dtypes) -> None:
    ends = []
    for alone in (False, True):
        p = torch.nn.Parameter(values((40, 36), 0))
        p.grad_dtype = None
        opt = heavyball.PRESETS[name]([p], lr=1e-2)
        for step in range(8):
            p.grad = values(p.shape, step + 1).to(dtypes[step // 3 % 2])
            opt.step_parameter(p) if alone else opt.step()
        ends.append(snapshot(opt))
    assert not differences(*ends)


# ---- numbers


@C.transform(strength=C.scalar(0.25))
def fading(update, strength):
    """A number of its own beside the step."""
    return update * strength, strength * 0.5


@pytest.mark.parametrize("key", ["step", "fading.strength"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, bf16, torch.float16, torch.int16, torch.int32, torch.int64], ids=str
)
@pytest.mark.parametrize("compile", [True, False])
def test_a_number_of_another_dtype_is_read_right_and_nothing_beside_it_is_written(
    key: str, dtype: torch.dtype, compile: bool
) -> None:
    ends = []
    for given in (torch.float64, dtype):
        p = torch.nn.Parameter(values((70,), 0))
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, fading, compile=compile)
        memory = torch.tensor([2, 123, 45, 67], dtype=given)
        for step in range(4):
            p.grad = values((70,), step + 1)
            opt.step()
            if step == 1:
                opt.state[p][key] = memory[0] if compile else memory[:1]
        assert memory.tolist()[1:] == [123, 45, 67]
        assert opt.state[p][key].dtype == torch.float64
        assert opt.state[p][key].shape == ()
        ends.append(snapshot(opt))
    assert not differences(*ends)


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("key", ["step", "fading.strength"])
def test_a_number_may_be_set_to_a_plain_one(key: str, compile: bool) -> None:
    ends = []
    for given in (partial(torch.tensor, dtype=torch.float64), int, float, np.int32):
        p = torch.nn.Parameter(values((70,), 0))
        opt = C.ChainOpt([p], 0.1, C.scale_by_adam, fading, compile=compile)
        for step in range(4):
            p.grad = values((70,), step + 1)
            opt.step()
            if step == 1:
                opt.state[p][key] = given(2)
        ends.append(snapshot(opt))
    assert not any(differences(end, ends[0]) for end in ends)


# ---- what has no memory, or not enough


class Wrapper(TwoTensor):
    """Its elements are those of two other tensors."""


def fake(x):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(x.shape, dtype=x.dtype)


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def cut_short(x):
    x = x.clone()
    x.untyped_storage().resize_(8)
    return x


BARE = {
    "two tensors": (lambda x: Wrapper(x.clone(), x.clone()), "is a Wrapper"),
    "fake": (fake, "is a FakeTensor"),
    "freed": (freed, "needs more memory than the 0 bytes"),
    "sparse": (lambda x: x.to_sparse(), "sparse"),
}
# what cannot be a gradient, or is wrong with state alone
OTHER = {
    "cut short": (cut_short, "needs more memory than the 8 bytes"),
    "compressed": (lambda x: x.to_sparse_csr(), "sparse"),
    "elsewhere": (lambda x: x.to("meta"), "on cpu, .*on meta"),
    "small": (lambda x: x[:1, :1].clone(), "has the shape"),
    "large": (lambda x: x.repeat(2, 1), "has the shape"),
    "flat": (lambda x: x.flatten(), "has the shape"),
    "whole numbers": (lambda x: x.int(), "is torch.int32, expected real"),
    "codes": (lambda x: x.to(torch.uint8), "is torch.uint8, expected real"),
    "complex": (lambda x: x.to(torch.complex64), "is torch.complex64"),
    "nested": (lambda x: torch.nested.nested_tensor([x]), "nested"),
    "a number": (lambda x: 0.5, "is 0.5, expected a tensor"),
    "nothing": (lambda x: None, "is None, expected a tensor"),
}


def trained(compile: bool = True, steps: int = 3, **options):
    p = torch.nn.Parameter(values((4, 5), 0))
    q = torch.nn.Parameter(values((3,), 0))
    opt = heavyball.AdamW([("q", q), ("p", p)], lr=0.1, compile=compile, **options)
    for step in range(steps):
        p.grad, q.grad = values((4, 5), step), values((3,), step)
        opt.step()
    return p, q, opt


def refused(opt, held, message: str, step=None) -> None:
    before = clones(held)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of the address of a FakeTensor
        with pytest.raises(ValueError, match=f"parameter 'p' of shape .*{message}"):
            (step or opt.step)()
    assert all(map(torch.equal, held, before))


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("what", BARE)
def test_a_gradient_without_memory_is_refused_before_anything_has_changed(what, compile) -> None:
    make, message = BARE[what]
    p, q, opt = trained(compile)
    held = [p, q, *opt.state[p].values(), *opt.state[q].values()]
    p.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p.grad = make(values((4, 5), 9))
    refused(opt, held, message)
    refused(opt, held, message, partial(opt.step_parameter, p))
    p.grad = values((4, 5), 9)
    opt.step()
    assert opt.state[p]["step"] == 4


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize("what", [*BARE, *OTHER])
def test_state_that_cannot_be_the_transforms_own_is_refused(what: str, compile: bool) -> None:
    make, message = {**BARE, **OTHER}[what]
    p, q, opt = trained(compile)
    key = "scale_by_adam.exp_avg"
    good = opt.state[p][key]
    held = [p, q, *opt.state[p].values(), *opt.state[q].values()]
    p.grad, q.grad = values((4, 5), 9), values((3,), 9)
    opt.state[p][key] = make(good)
    refused(opt, held, message)
    opt.state[p][key] = good
    opt.step()
    assert opt.state[p]["step"] == 4


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize(
    "value",
    [torch.zeros(3), torch.tensor(1j), torch.tensor(True), torch.zeros(0)]
    + [None, "2", True, [2.0], float("nan"), float("inf"), -1],
    ids=str,
)
def test_a_step_that_is_no_count_is_refused(value: object, compile: bool) -> None:
    p, q, opt = trained(compile)
    held = [p, q, *opt.state[q].values()]
    opt.state[p]["step"] = value
    refused(opt, held, "'step'")


@pytest.mark.parametrize("compile", [True, False])
@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        ({"storage_dtype": "8bit"}, "scale_by_adam.exp_avg:scale", torch.zeros(0, dtype=bf16)),
        ({"storage_dtype": "8bit"}, "scale_by_adam.exp_avg:scale", torch.zeros(1)),
        ({"storage_dtype": "4bit"}, "scale_by_adam.exp_avg:scale", torch.zeros(31)),
        ({"storage_dtype": "4bit"}, "scale_by_adam.exp_avg", torch.zeros(64, 64).byte()),
        ({"storage_dtype": "4bit"}, "scale_by_adam.exp_avg", torch.zeros(2048)),
        ({"storage_dtype": "rank1"}, "scale_by_adam.exp_avg", torch.zeros(63)),
        ({"storage_dtype": "rank1"}, "scale_by_adam.exp_avg:columns", torch.zeros(64).int()),
        ({"storage_dtype": "rank1"}, "scale_by_adam.exp_avg:signs", torch.zeros(64, 8)),
        ({"ecc": "bf16+8"}, "scale_by_adam.exp_avg:correction", torch.zeros(4, 5)),
        ({"ecc": "bf16+8"}, "scale_by_adam.exp_avg:correction", torch.zeros(3, dtype=torch.int8)),
        ({"ecc": "bf16+8"}, "scale_by_adam.exp_avg", torch.zeros(4, 5)),
    ],
)
def test_a_companion_that_does_not_fit_is_refused(options, key, value, compile: bool) -> None:
    p, q, opt = trained(compile, **options)
    held = [p, q, *opt.state[q].values()]
    opt.state[p][key] = value
    refused(opt, held, "scale_by_adam.exp_avg")


@pytest.mark.parametrize("compile", [True, False])
def test_a_parameter_whose_memory_was_freed_is_refused(compile: bool) -> None:
    p, q, opt = trained(compile)
    bytes_ = p.untyped_storage().nbytes()
    p.untyped_storage().resize_(0)
    refused(opt, [q, *opt.state[p].values(), *opt.state[q].values()], "needs more memory")
    p.untyped_storage().resize_(bytes_)
    p.data.fill_(1.0)
    opt.step()


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_a_step_inside_a_transform_of_functions_is_refused(transform: str) -> None:
    p, q, opt = trained()
    held = [p, q, *opt.state[p].values(), *opt.state[q].values()]

    def inside(g):
        p.grad = g.detach()
        refused(opt, held, "inside a transform of torch.func")
        return g.sum()

    given = values((4, 5), 9)
    torch.func.vmap(inside)(given[None]) if transform == "vmap" else torch.func.grad(inside)(given)


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"compile": False}, {"fuse_backward": True}], ids=str)
def test_a_dtensor_is_stepped_as_the_tensor_that_it_is_made_of(mesh, options) -> None:
    whole, same = (torch.nn.Parameter(values((4, 5), 0)) for _ in range(2))
    sharded = torch.nn.Parameter(DTensor.from_local(values((4, 5), 0), mesh))
    opt = heavyball.AdamW([("q", whole)], **options)
    opt.add_param_group({"params": [("p", sharded)]})
    alone = heavyball.AdamW([same], **options)
    for _ in range(3):
        for param in (whole, sharded, same):
            param.square().sum().backward()
        opt.step()
        alone.step()
        opt.zero_grad()
        alone.zero_grad()
    assert torch.equal(sharded.to_local(), same)
    assert torch.equal(whole, same)
    assert isinstance(opt.state[sharded]["scale_by_adam.exp_avg"], DTensor)


def test_a_dtensor_that_is_yet_to_be_reduced_is_refused_by_name(mesh) -> None:
    partial = DTensor.from_local(values((4, 5), 0), mesh, [torch.distributed.tensor.Partial()])
    with pytest.raises(ValueError, match=r"parameter 'p' of shape \(4, 5\) is placed as \(P"):
        heavyball.AdamW([("p", torch.nn.Parameter(partial))])


def test_tensors_without_elements_need_no_memory() -> None:
    empty = torch.nn.Parameter(torch.empty(0, 3))
    full = torch.nn.Parameter(values((3,), 0))
    opt = heavyball.AdamW([empty, full], compile=True)
    for step in range(3):
        empty.grad, full.grad = torch.empty(0, 3), values((3,), step)
        opt.step()
    assert opt.state[full]["step"] == 3


def test_a_subclass_with_memory_of_its_own_is_a_plain_tensor() -> None:
    class Named(torch.Tensor):
        pass

    ends = []
    for kind in (torch.Tensor, Named):
        p = torch.nn.Parameter(values((4, 5), 0).as_subclass(kind))
        opt = heavyball.AdamW([p], lr=0.1, compile=True)
        for step in range(3):
            p.grad = values((4, 5), step).as_subclass(kind)
            opt.step()
        ends.append(p.detach().as_subclass(torch.Tensor))
    assert torch.equal(*ends)
