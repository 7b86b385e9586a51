"""State as transforms see it (promoted), and as it is stored (created and written)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.core.program import Node, Program, WholeNode
from heavyball.numerics import SCALAR, compute_dtype, working
from heavyball.runtime.job import Job, Pieces
from heavyball.runtime.meta import Remembering
from heavyball.state.declare import Holds, State
from heavyball.state.formats import Storage
from heavyball.state.held import create, create_param, drawing, held, held_param, is_packed

if TYPE_CHECKING:
    from heavyball.runtime.job import Call

# The attribute that counts how often an optimizer's `state` was asked for: whoever asks may change it.
SHOWN = "_state_shown"
# Every state as the mathematics has it.
PLAIN = Storage()


class Own(dict[str, Tensor]):
    """The optimizer's own entries of a parameter's state.

    What is put in or taken out is so in the state itself.
    """

    def __init__(self, state: dict[str, Tensor], program: Program):
        super().__init__({k: v for k, v in state.items() if program.owns((k,))})
        self._state = state

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        super().__setitem__(key, tensor)
        self._state[key] = tensor

    def clear(self) -> None:
        for key in self:
            del self._state[key]
        super().clear()


def old_states(call: "Call") -> list[Pieces]:
    """The states of a call's node as they are now, promoted."""
    return [_whole_state(call, name) for name in call.node.transform.states]


def _whole_state(call: "Call", name: str) -> Pieces:
    node, job = call.node, call.job
    declared = node.transform.states[name]
    if not declared.several:
        new = call.new.get(node.state_key(name))
        return working_state(node, name, job) if new is None else new
    if not node.transform.options.get(declared.needed_by or "", True):
        return None
    keys = pieces(job.program, node, name, job.param)
    return tuple(None if key is None else _piece(key, call) for key in keys)


def _piece(key: str, call: "Call") -> Tensor:
    if key in call.new:
        return call.new[key]
    return loaded(call.job, key)


def loaded(job: "Job", key: str) -> Tensor:
    """A state tensor promoted to the dtype of the mathematics, however it is kept; never 0-d."""
    return _loaded(job, key, job.program.holds_of(key))


def _loaded(job: "Job", key: str, holds: Holds | None) -> Tensor:
    kept = held(job.state, key, holds, packed_shape(job.program, key, job.param, job.state))
    tensor = kept.load(compute_dtype(job.param.dtype))
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def packed_shape(
    program: Program, key: str, param: Tensor, state: Mapping[str, Tensor]
) -> torch.Size | None:
    """The shape of the values of a state where they are packed in tensors of other shapes."""
    return value_shape(program, key, param) if is_packed(state, key) else None


def value_shape(program: Program, key: str, param: Tensor) -> torch.Size:
    """The shape of the values of a parameter's state, however it is kept."""
    place = key, param.shape, param.dtype
    if place not in program.shapes:
        made: dict[str, Tensor] = {}
        like = param.detach().to("meta")
        with Remembering():
            for node, name, declared in program.states:
                own = node.state_key(name)
                if own == key or (declared.several and key.rpartition(".")[0] == own):
                    _add(program, node, name, like, made, PLAIN)
        program.shapes[place] = made[key].shape
    return program.shapes[place]


def working_param(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """A parameter as the mathematics sees it, its correction included."""
    return working(held_param(state, param.detach()).load(compute_dtype(param.dtype)))


def working_state(node: Node, name: str, job: "Job") -> Tensor | None:
    """A state of one tensor as the mathematics sees it."""
    key, declared = node.state_key(name), node.transform.states[name]
    tensor = job.state.get(key)
    if tensor is None or declared.is_number:
        return tensor
    return _loaded(job, key, declared.holds)


def new_states(node: Node, job: "Job", values: list[Pieces]) -> dict[str, Tensor]:
    """New states by key."""
    found: dict[str, Tensor] = {}
    for name, value in zip(node.transform.states, values, strict=True):
        if isinstance(value, tuple):
            keys = pieces(job.program, node, name, job.param)
            pairs = zip(keys, value, strict=True)
            found.update((k, v) for k, v in pairs if k is not None and v is not None)
        elif value is not None and node.state_key(name) in job.state:
            found[node.state_key(name)] = value
    return found


def add_several(
    program: Program,
    node: Node,
    name: str,
    param: Tensor,
    state: dict[str, Tensor],
    storage: Storage,
) -> None:
    """Create the tensors of a state that has several, where they are not there yet."""
    keys = pieces(program, node, name, param)
    if any(key is not None and key not in state for key in keys):
        declared = node.transform.states[name]
        made = declared.init(working_param(param, state), node.transform.options)
        for key, tensor in zip(keys, made, strict=True):
            if key is not None and key not in state:
                place = node.state_key(name), name, declared, tensor.shape, param.shape
                create(state, key, tensor, storage.format_of(*place), declared.holds)


def pieces(program: Program, node: Node, name: str, param: Tensor) -> tuple[str | None, ...]:
    """The keys of a state of several tensors, None where there is none for this shape."""
    place = node.state_key(name), param.shape, param.dtype
    if place not in program.pieces:
        init = node.transform.states[name].init
        with Remembering():
            made = init(working(param.detach().to("meta")), node.transform.options)
        if not isinstance(made, tuple):
            raise TypeError(f"{place[0]}: init returned {type(made).__name__}, expected a tuple")
        keys = (f"{place[0]}.{i}" for i in range(len(made)))
        program.pieces[place] = tuple(
            None if tensor is None else key for key, tensor in zip(keys, made, strict=True)
        )
    return program.pieces[place]


def add_missing_state(
    program: Program,
    param: Tensor,
    group: Mapping[str, Any],
    state: dict[str, Tensor],
    all_lazy: bool = False,
    storage: Storage | None = None,
) -> None:
    """Create the state that a parameter needs under the group's present values and does not have.

    all_lazy: also what it would need under other values. storage: formats other than the program's.
    """
    storage = program.storage if storage is None else storage
    if "step" not in state:
        state["step"] = torch.zeros((), dtype=SCALAR, device=param.device)
    create_param(state, param, storage.param)
    for node, name, declared in program.states:
        key = node.state_key(name)
        if key in state:
            continue
        if key in program.lazy_keys and not (all_lazy or lazy_wanted(node, declared, group)):
            continue
        _add(program, node, name, param, state, storage)


def _add(
    program: Program,
    node: Node,
    name: str,
    param: Tensor,
    state: dict[str, Tensor],
    storage: Storage,
) -> None:
    """Create one state."""
    key, declared = node.state_key(name), node.transform.states[name]
    if declared.several:
        add_several(program, node, name, param, state, storage)
        return
    tensor = declared.init(working_param(param, state), node.transform.options)
    if tensor is not None:
        plain = declared.is_number or param.ndim or isinstance(node, WholeNode)
        shape = tensor.shape if plain else param.shape
        chosen = storage.format_of(key, name, declared, shape, param.shape)
        # a view would hold on to its memory a second time, see `heavyball.compiler.run.watch.Kept`
        tensor = tensor if tensor.shape == shape else tensor.reshape(shape).clone()
        create(state, key, tensor, chosen, declared.holds)


def lazy_wanted(node: Node, declared: State, group: Mapping[str, Any]) -> bool:
    """Whether a state that may be missing is needed by this group."""
    if declared.given_up(node.transform.options, group):
        return False
    if declared.needed_by not in node.transform.hyper:
        return True
    key, index = node.hyper[declared.needed_by or ""]
    return bool(group[key] if index is None else group[key][index])


def write(job: Job, values: dict[str, Tensor], step: Tensor) -> None:
    """Write new values by key in the formats in which they are kept; empties `values`.

    step: of which the random bits are.
    """
    targets = {key: job.param if key == "param" else job.state[key] for key in values}
    old = {target.untyped_storage().data_ptr() for target in targets.values()}
    # a transform may hand on an old state as another state: save it before it is overwritten
    safe = {
        k: v.clone() if v.untyped_storage().data_ptr() in old and not _same(targets[k], v) else v
        for k, v in values.items()
    }
    values.clear()  # each is freed when it is written
    try:
        _write_each(job, targets, safe, step)
    except BaseException:
        # a parameter of this step beside state of the last would be worse than either
        _write_each(job, targets, safe, step)
        raise


def _write_each(
    job: Job, targets: Mapping[str, Tensor], values: dict[str, Tensor], step: Tensor
) -> None:
    """Write what is left in `values`, and take out each when it is written."""
    for key in list(values):
        _write_one(job, key, targets[key], values[key], step)
        del values[key]


def _write_one(job: Job, key: str, target: Tensor, value: Tensor, step: Tensor) -> None:
    packed = None if key == "param" else packed_shape(job.program, key, job.param, job.state)
    value = value.reshape(target.shape if packed is None else packed)
    if _same(target, value):
        return  # handed back as it was
    like = target
    if key == "param":
        kept: Any = held_param(job.state, target)
    elif (holds := job.program.holds_of(key)) is not None:
        kept = held(job.state, key, holds, packed)
        like = target if packed is None else value.contiguous()
    else:
        target.copy_(value)
        return
    origin = None if job.origin is None else job.origin(key)
    kept.store(value, drawing(like, job.stream, key, step, origin))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of memory in the same order."""
    place = one.data_ptr(), one.numel(), one.dtype
    return place == (other.data_ptr(), other.numel(), other.dtype) and (
        one.stride() == other.stride() or _axes(one) == _axes(other)
    )


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides; those of one element have any stride, which a reshape replaces."""
    return [axis for axis in zip(tensor.shape, tensor.stride(), strict=True) if axis[0] != 1]
