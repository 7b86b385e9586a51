"""The parts of one parameter's step: the job, the frame of its run, requests and answers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from heavyball.core.hyper import frozen
from heavyball.core.program import Node, Program, WholeNode
from heavyball.core.transform import LOSS
from heavyball.numerics import SCALAR, Origin, compute_dtype, version_of

# One state of a transform: a tensor, several, or none for this shape.
Pieces = Tensor | tuple[Tensor | None, ...] | None


@dataclass(eq=False)
class Batch:
    """An opaque result of one call, and which of its parameters one is."""

    value: Any
    size: int
    index: int


@dataclass(eq=False)
class Call:
    """One parameter's turn at a whole transform, or at its `after` where `after` is true.

    update: None for `after`. count: None where only the tensor `step` knows it. context: what the
    function asks for besides options and hyper-parameters; numbers are 0-d tensors. gate: whether it
    is run at all. new: states that this step has changed before. trial: whether the answer is thrown
    away and asked for again, so that states are written in copies only.
    """

    node: "WholeNode"
    job: "Job"
    update: Tensor | None
    count: int | None
    context: dict[str, Any]
    after: bool = False
    gate: Tensor | None = None
    trial: bool = False
    new: dict[str, Tensor] = field(default_factory=dict)
    old: list[Pieces] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)

    @property
    def shape(self) -> torch.Size:
        return self.job.param.shape or torch.Size([1])

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.job.param.dtype)


@dataclass(eq=False)
class Answer:
    """The results for one parameter: the update, the new states, and provided values."""

    update: Any
    states: list[Pieces]
    count: int
    provided: dict[str, Any] = field(default_factory=dict)
    vectors: list[Tensor] = field(default_factory=list)
    squares: list[Tensor] = field(default_factory=list)


def fed_key(name: str | None) -> str:
    """The entry of a group that holds what was fed under a name, for the time of a step."""
    return f"_fed:{name}"


# The entry of a group that holds the loss, for the time of a step.
LOSS_KEY = "_loss"
# The entry of a group that holds first gradients by the parameters' places, for the time of a step.
FIRST_KEY = "_first_grads"

# Dtypes of state that do not have the range of float64.
NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Scalars:
    """The live hyper-parameters of one group as 0-d tensors, refilled where they changed."""

    def __init__(self) -> None:
        self._filled: dict[tuple[str, torch.device], tuple[Any, Any]] = {}

    def get(self, group: Mapping[str, Any], key: str, device: torch.device) -> Any:
        """The value as a tensor, a tuple as a tuple of tensors; None stays None."""
        value = group[key]
        if value is None:
            return None
        value = frozen(value)  # a list could change in place and still be equal to itself
        if isinstance(value, Tensor):
            return value.detach().to(device, SCALAR).reshape(())
        known, tensors = self._filled.get((key, device), (None, None))
        if known != value:
            parts = value if isinstance(value, tuple) else (value,)
            made = tuple(torch.full((), v, dtype=SCALAR, device=device) for v in parts)
            tensors = made if isinstance(value, tuple) else made[0]
            self._filled[key, device] = value, tensors
        return tensors


class Counts:
    """The steps of parameters as Python numbers, so that no step has to wait for a device.

    A number is read from its tensor again when that was replaced or written by somebody else.
    """

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def read(self, step: Tensor) -> int:
        """How many gradients a parameter has had, given its `step` tensor."""
        version, count = self._known.get(step, (None, 0))
        if version is None or version != version_of(step):
            count = int(step)
            self.note(step, count)
        return count

    def note(self, step: Tensor, count: int) -> None:
        """Remember what was just written to a `step` tensor."""
        self._known[step] = version_of(step), count


@dataclass
class Job:
    """One parameter's part of a step."""

    program: Program
    param: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    state: dict[str, Tensor]
    scalars: Scalars
    # of the bits to round the parameter and its state with; None rounds to nearest
    stream: int | None = None
    # for whole transforms: the stream of their noise, and who knows `step` as a Python number
    noise: int = 0
    place: int = 0
    counts: Counts | None = None
    # where this is a part of a tensor: by the key of a state, or "param", where in the whole it lies
    origin: Callable[[str], Origin | None] | None = None
    # shares of sums that are needed after the step, by their names
    gave: dict[str, Tensor] = field(default_factory=dict)
    # whether something is kept that has not the range of float64
    narrow: bool = field(init=False)

    def __post_init__(self) -> None:
        self.narrow = has_narrow(self.state)

    @property
    def count(self) -> int:
        """How many gradients the parameter had before this one."""
        return 0 if self.counts is None else self.counts.read(self.state["step"])


def has_narrow(state: Mapping[str, Tensor]) -> bool:
    """Whether state (or its scales) is of a dtype with the range of float32 or less."""
    return any(tensor.dtype in NARROW for tensor in state.values())


@dataclass
class Frame:
    """The frame of a program's run: context for its elements, and the new state so far."""

    job: Job
    env: dict[str, Any]
    new: dict[str, Tensor] = field(default_factory=dict)
    hooks: list[Call] = field(default_factory=list)  # what may be to do after the write
    ended: bool = False  # a host decision: nothing behind this point happens for the parameter

    def hyper(self, node: Node, name: str) -> Any:
        key, index = node.hyper[name]
        value = self.job.scalars.get(self.job.group, key, self.job.param.device)
        value = value if index is None else value[index]
        change = self.env.get(self.job.program.hyper_change.get(name, ""))
        return value if value is None or change is None else value * change

    def fed(self, node: Node) -> Any:
        """What `feed` was given for a node, one number."""
        key = fed_key(node.transform.signal)
        return self.job.scalars.get(self.job.group, key, self.job.param.device)

    def context(self, name: str) -> Any:
        if name in self.job.program.common and name not in self.env:
            return self.job.scalars.get(self.job.group, name, self.job.param.device)
        if name == LOSS:
            return self.job.scalars.get(self.job.group, LOSS_KEY, self.job.param.device)
        if name == "lr" and "lr" not in self.env:
            return self.env["base_lr"] * self._warmup()
        return self.env[name]

    def _warmup(self) -> Tensor | float:
        if not self.job.group["warmup_steps"]:
            return 1.0
        steps = self.job.scalars.get(self.job.group, "warmup_steps", self.job.param.device)
        return (self.env["step"] / steps).clamp(max=1)
