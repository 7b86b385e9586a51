"""A chain's program for one tensor as a small graph, recorded by running it once on meta tensors."""

import contextlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from heavyball.compiler.frontend.ops import OPERATIONS, RECORDED, NotPrintableError
from heavyball.compiler.passes.axes import Runs, along, first_axes, is_along
from heavyball.core.hyper import is_sequence
from heavyball.core.program import Program, WholeNode
from heavyball.numerics import measures
from heavyball.runtime.execute import Request, complete, share_name
from heavyball.runtime.job import Answer, Call, Job, has_narrow
from heavyball.runtime.meta import result_of
from heavyball.runtime.state import packed_shape
from heavyball.runtime.step import SCALAR, compute_dtype, start, working
from heavyball.state.held import is_companion


@dataclass(frozen=True)
class Value:
    """One node: an operation on earlier nodes (their numbers) and constants.

    level: "scalar" for a number per tensor (float64), "element" for one per element; "slice" for one
        per k-th element, see `numerics.every`; others, such as the rows of a matrix, see `axes.py`.
    kind: "float" or "bool".
    """

    op: str
    args: tuple[Any, ...]
    level: str
    kind: str


@dataclass(frozen=True)
class Ref:
    """An argument that is another node."""

    index: int


@dataclass(eq=False)
class Question:
    """A whole transform's turn: nodes that it must be told, and which outputs are known by then.

    context: a node for each name, or an `Opaque` result of an earlier question, or None.
    step, gate: nodes; gate is None where nothing can stop the step before. counted: whether `step` is
    the parameter's own count, which the host knows.
    """

    node: WholeNode
    update: int
    context: "dict[str, int | Opaque | None]"
    step: int
    counted: bool
    gate: int | None
    known: dict[str, int]


@dataclass(frozen=True)
class Opaque:
    """A result that one whole transform hands to another."""

    question: int
    name: str


@dataclass
class Graph:
    """Nodes in topological order, and the outputs."""

    values: list[Value] = field(default_factory=list)
    outputs: dict[str, int] = field(default_factory=dict)
    every: int | None = None  # for slices: how far their elements are apart
    wide: Runs = ()  # the axes with more than one element
    tensors: dict[str, str] = field(default_factory=dict)  # the level of what is no number, by name
    step: int | None = None  # the node of the step, where another graph writes it

    def add(self, op: str, args: tuple[Any, ...], level: str, kind: str) -> int:
        value = Value(op, args, level, kind)
        if value in self._known:
            return self._known[value]
        self.values.append(value)
        self._known[value] = len(self.values) - 1
        return len(self.values) - 1

    def __post_init__(self) -> None:
        self._known: dict[Value, int] = {}

    @property
    def counted(self) -> int:
        """The node of the step, from which random bits are derived."""
        return self.outputs["step"] if self.step is None else self.step

    @property
    def roots(self) -> list[int]:
        """The nodes that something outside reads."""
        return [*self.outputs.values(), *([] if self.step is None else [self.step])]

    def needed(self, roots: Iterable[int], stored: Container[int] = ()) -> set[int]:
        """What nodes are computed from, and they themselves; `stored` are there already."""
        found: set[int] = set()
        todo = list(roots)
        while todo:
            index = todo.pop()
            if index not in found:
                found.add(index)
                if index not in stored:
                    todo += [a.index for a in self.values[index].args if isinstance(a, Ref)]
        return found

    def live(self, stored: Mapping[int, str] | None = None) -> "Graph":
        """The same graph without what no output needs.

        stored: nodes that are found in tensors, by the names of these.
        """
        stored = stored or {}
        moved: dict[int, int] = {}
        kept = Graph(every=self.every, wide=self.wide, tensors=self.tensors)
        for index in sorted(self.needed(self.roots, stored)):
            v = self.values[index]
            op, args = v.op, v.args
            if index in stored:
                op, args = "load", (stored[index],)
            args = tuple(Ref(moved[a.index]) if isinstance(a, Ref) else a for a in args)
            moved[index] = kept.add(op, args, v.level, v.kind)
        kept.outputs = {name: moved[index] for name, index in self.outputs.items()}
        kept.step = None if self.step is None else moved[self.step]
        return kept

    @property
    def levels(self) -> set[str]:
        """The levels of all values, and of the tensors that are written."""
        written = {self.tensors[name] for name in self.outputs if name in self.tensors}
        return {v.level for v in self.values} | written

    @property
    def starts(self) -> Runs | None:
        """The first axis of each run where values belong to some of the axes, see `passes/axes.py`."""
        return first_axes(self.levels, self.wide)

    def copy(self) -> "Graph":
        """A graph of the same nodes under the same numbers."""
        made = Graph([], dict(self.outputs), self.every, self.wide, self.tensors, self.step)
        for v in self.values:
            made.add(v.op, v.args, v.level, v.kind)
        return made

    def key(self) -> str:
        """A text that two graphs share exactly if they are the same."""
        return repr((self.values, sorted(self.outputs.items())))


VIEWS = {
    "detach.default",
    "alias.default",
    "view.default",
    "_unsafe_view.default",
    "clone.default",
    "expand.default",
    "squeeze.dim",
    "squeeze.default",
    "unsqueeze.default",
    "lift_fresh.default",
    "contiguous.default",
}
# Where a program asks for the dtype of the result.
CASTS = {"_to_copy.default", "copy_.default"}
MADE = {"zeros_like.default", "ones_like.default", "full.default", "full_like.default"}
# What torch makes of conditions and numbers: `1 - strength * turned` is float64, `0.5 * turned` float32,
# `2 * turned` int64.
PROMOTED = (torch.float64, torch.float32, torch.int64)
FILLS = {"zeros_like.default": 0.0, "ones_like.default": 1.0}
REDUCING = {"sum", "mean", "linalg_vector_norm", "amax", "any", "all"}
SUMMING = {"sum", "linalg_vector_norm"}


class SizeWatch(TorchFunctionMode):
    """Notes whether a function looks at the size of a tensor, which then becomes part of the graph."""

    LOOKS = frozenset({"shape", "size", "numel", "nelement", "__len__", "stride", "nbytes"})

    def __init__(self) -> None:
        super().__init__()
        self.looked = False
        self._ignored = False

    @contextlib.contextmanager
    def ignored(self) -> Iterator[None]:
        """Look at sizes without being noted."""
        before, self._ignored = self._ignored, True
        try:
            yield
        finally:
            self._ignored = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in self.LOOKS and not self._ignored:
            self.looked = True
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Runs a function on meta tensors and writes down what it does.

    narrow_means: whether means over some of the axes are nodes of their own, which stay in the range of
    the elements where the sum would not.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, narrow_means: bool = False):
        super().__init__()
        self.narrow_means = narrow_means
        self.graph = Graph(wide=tuple(axis for axis, n in enumerate(shape) if n > 1))
        self.shape, self.numel, self.dtype = tuple(shape), shape.numel(), dtype
        # no tensor of a chain has this shape, so what has it is a slice
        self.slice_shape = torch.Size([self.numel + 1])
        self.watch = SizeWatch()
        self.questions: list[Question] = []
        self._index: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def bind(self, tensor: Tensor, op: str, *args: Any) -> Tensor:
        """Declare a tensor as an input of the graph."""
        self._name(tensor, self.graph.add(op, args, self._level(tensor), self._kind(tensor)))
        return tensor

    def tensor(self, tensor: Tensor, name: str) -> Tensor:
        """Declare a tensor as an input that is kept in memory under this name."""
        level = self._level(tensor)
        if level == "scalar":
            raise NotPrintableError(
                f"{name} of shape {tuple(tensor.shape)}, one element of several"
            )
        self.graph.tensors[name] = level
        return self.bind(tensor, "load", name)

    def number(self, op: str, *args: Any) -> Tensor:
        """A new scalar input."""
        return self.bind(torch.empty((), dtype=SCALAR, device="meta"), op, *args)

    def ask(self, call: Call) -> Answer:
        """Note a whole transform's turn; what it answers are further inputs of the graph."""
        with self.watch.ignored():
            return self._ask(call)

    def _ask(self, call: Call) -> Answer:
        number, t = len(self.questions), call.node.transform
        place = f"whole.{number}"
        context = {
            name: self.find(value) if isinstance(value, Tensor) else value
            for name, value in call.context.items()
            if name != "step" or name in t.context
        }
        self.questions.append(
            Question(
                call.node,
                self.find(call.update),  # type: ignore[arg-type]
                context,
                self.find(call.context["step"]),
                call.count is not None,
                None if call.gate is None else self.find(call.gate),
                {name: self.find(tensor) for name, tensor in call.new.items()},
            )
        )
        provided: dict[str, Any] = {name: Opaque(number, name) for name in t.opaque}
        for name in t.provides:
            provided[name] = self._provided(name, f"{place}.{name}")
        update = self._whole(f"{place}.update")
        return Answer(update, [None] * len(t.states), call.count, provided)  # type: ignore[arg-type]

    def _whole(self, name: str) -> Tensor:
        return self.tensor(torch.empty(self.shape, dtype=self.dtype, device="meta"), name)

    def _provided(self, name: str, place: str) -> Tensor:
        if name == "grad":
            return self._whole(place)
        dtype = torch.bool if name == "gate" else SCALAR
        return self.bind(torch.empty((), dtype=dtype, device="meta"), "number", place)

    def find(self, tensor: Tensor) -> int:
        """The node of a tensor that the function returned."""
        if id(tensor) not in self._index:
            raise NotPrintableError("a tensor that is neither an input nor computed from inputs")
        return self._index[id(tensor)]

    def count(self, tensor: Tensor) -> Tensor | int:
        """What `numerics.count` gives while recording: one node for every size of parameter."""
        with self.watch.ignored():
            if tensor.numel() == self.numel and tensor.ndim > 0:
                return self.number("numel")
        return tensor.numel()

    def single(self, tensor: Tensor) -> bool:
        """What `numerics.is_single` gives: whether there is one element is part of a graph's key."""
        with self.watch.ignored():
            return tensor.numel() == 1

    def every(self, tensor: Tensor, k: int) -> Tensor:
        """The result of `numerics.every`: the inputs of the elements, for every k-th of them."""
        if self.graph.every not in (None, k):
            raise NotPrintableError(
                f"slices of every {self.graph.every}-th and every {k}-th element"
            )
        self.graph.every = k
        index = self._sliced(self.find(tensor), k)
        found = torch.empty(self.slice_shape, dtype=tensor.dtype, device="meta")
        self._name(found, index)
        return found

    def _sliced(self, index: int, k: int) -> int:
        value = self.graph.values[index]
        if value.level == "scalar":
            return index
        if value.level != "element":
            raise NotPrintableError(f"a slice of values per {value.level}")
        if value.op == "load":
            return self.graph.add("pick", value.args, "slice", value.kind)
        args = tuple(Ref(self._sliced(a.index, k)) if isinstance(a, Ref) else a for a in value.args)
        return self.graph.add(value.op, args, "slice", value.kind)

    def shape_of(self, tensor: Tensor) -> torch.Size:
        """What `numerics.shape_of` gives."""
        with self.watch.ignored():
            return tensor.shape

    def written(self, tensors: Mapping[str, Tensor]) -> dict[str, int]:
        """The nodes of tensors by name, without those that are written back as they were loaded."""
        found = {name: self.find(tensor) for name, tensor in tensors.items()}
        return {n: i for n, i in found.items() if n == "param" or not self._is_loaded(n, i)}

    def _is_loaded(self, name: str, index: int) -> bool:
        value = self.graph.values[index]
        return value.op == "load" and value.args == (name,)

    def _name(self, tensor: Tensor, index: int) -> None:
        self._index[id(tensor)] = index
        self._alive.append(tensor)  # or another tensor could get the same id

    def _level(self, tensor: Tensor, any_dtype: bool = False) -> str:
        """Where a tensor's values belong.

        any_dtype: of the elements too, as sums are float64.
        """
        if tensor.ndim == 0:
            return "scalar"
        if tensor.shape == self.slice_shape:
            return "slice"
        if tensor.numel() == self.numel:
            if not any_dtype and tensor.dtype not in (self.dtype, torch.bool):
                raise NotPrintableError(f"elements of {tensor.dtype}, expected {self.dtype}")
            return "element"
        if tensor.numel() == 1:
            return "scalar"
        return self._axis_level(tensor.shape)

    def _axis_level(self, shape: torch.Size) -> str:
        """The axes along which there is one value for every element; along the others there is one."""
        if len(shape) == len(self.shape):
            kept = [axis for axis in self.graph.wide if shape[axis] == self.shape[axis]]
            if all(shape[axis] == 1 for axis in range(len(shape)) if axis not in kept):
                return along(kept)
        raise NotPrintableError(
            f"a tensor of shape {tuple(shape)} beside {self.shape}: neither all elements, nor one for "
            "each along some of the axes"
        )

    @staticmethod
    def _kind(tensor: Tensor) -> str:
        if tensor.dtype == torch.bool:
            return "bool"
        if not tensor.is_floating_point():
            raise NotPrintableError(f"a tensor of {tensor.dtype}")
        return "float"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        with self.watch.ignored():
            result = result_of(func, args, kwargs)
        if name == "empty.memory_format":
            return result
        if not isinstance(result, Tensor):
            raise NotPrintableError(f"the operation {name}")
        with self.watch.ignored():
            self._name(result, self._record(name, args, kwargs, result))
        return result

    def _record(self, name: str, args: Any, kwargs: Any, result: Tensor) -> int:
        reduced = name.split(".")[0] in REDUCING
        promoted = result.dtype in PROMOTED and self._promotes(name, args)
        level = self._level(result, reduced or promoted)
        kind = "float" if promoted else self._kind(result)
        if name in VIEWS:
            return self.find(args[0])
        if name in FILLS:
            return self._constant(FILLS[name], level, kind)
        if name in ("full.default", "full_like.default"):
            return self._constant(float(args[1]), level, kind)
        if name == "scalar_tensor.default":
            return self._constant(float(args[0]), level, kind)
        if name in CASTS:
            return self._cast(self._argument(args[0]), level, kind)
        if reduced:
            return self._reduction(name, args, kwargs, level)
        if name.startswith("clamp."):
            return self._clamp(args, kwargs, level)
        if name == "rsub.Scalar":
            return self._emit("sub", (args[1], args[0]), level, kind)
        if name in RECORDED:
            operation = OPERATIONS[RECORDED[name]]
            if kwargs.get("alpha", 1) != 1 or len(args) > len(_plain(args)):
                raise NotPrintableError(f"the operation {name} with {kwargs or args}")
            if name.startswith("bitwise") and kind != "bool":
                raise NotPrintableError(f"the operation {name} of whole numbers")
            if operation.is_logic:
                # of numbers, torch takes whether they are not zero
                truths = (Ref(self._cast(self._argument(a), level, "bool")) for a in args)
                return self.graph.add(operation.name, tuple(truths), level, kind)
            return self._emit(operation.name, args, level, kind)
        raise NotPrintableError(f"the operation {name}")

    @staticmethod
    def _promotes(name: str, args: Any) -> bool:
        """Whether torch's rules alone decide the dtype of an operation's result."""
        if name in CASTS:
            return args[0].dtype == torch.bool
        return name not in MADE

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self.find(value))
        if isinstance(value, bool | int | float):
            return float(value)
        raise NotPrintableError(f"an argument {value!r}")

    def _emit(self, op: str, args: Any, level: str, kind: str) -> int:
        return self.graph.add(op, tuple(self._argument(a) for a in args), level, kind)

    def _constant(self, value: float, level: str, kind: str) -> int:
        return self.graph.add("const", (value,), "scalar", kind)

    def _cast(self, value: Ref, level: str, kind: str) -> int:
        source = self.graph.values[value.index]
        if source.kind == kind:
            return value.index
        op = "to_float" if kind == "float" else "to_bool"
        return self.graph.add(op, (value,), source.level, kind)

    def _clamp(self, args: Any, kwargs: Any, level: str) -> int:
        bounds = dict(zip(("min", "max"), args[1:], strict=False)) | kwargs
        value: Ref = self._argument(args[0])
        for side, op in (("min", "clamp_min"), ("max", "clamp_max")):
            if bounds.get(side) is not None:
                arguments = (value, self._argument(bounds[side]))
                value = Ref(self.graph.add(op, arguments, level, "float"))
        return value.index

    def _reduction(self, name: str, args: Any, kwargs: Any, level: str) -> int:
        source: Ref = self._argument(args[0])
        before = self.graph.values[source.index].level
        op = name.split(".")[0]
        order = args[1] if len(args) > 1 and op == "linalg_vector_norm" else kwargs.get("ord", 2)
        if op == "linalg_vector_norm" and order != 2:
            raise NotPrintableError(f"a norm of order {order}")
        # a value that was spread over more elements counts as often as it is there
        spread = before != self._level(args[0], any_dtype=True)
        if before == level and (op == "mean" or (op in SUMMING and not spread)):
            # over axes of size 1
            plain = op != "linalg_vector_norm"
            return source.index if plain else self.graph.add("abs", (source,), level, "float")
        count = _count_between(before, level)
        if count is None or spread:
            raise NotPrintableError(f"the operation {name} from {before} to {level}")
        if op == "linalg_vector_norm":
            square = Ref(self.graph.add("square", (source,), before, "float"))
            total = self.graph.add("sum", (square,), level, "float")
            return self.graph.add("sqrt", (Ref(total),), level, "float")
        if self.graph.values[source.index].kind == "bool":
            source = Ref(self.graph.add("to_float", (source,), before, "float"))
        whole = (before, level) == ("element", "scalar")
        if (op in ("any", "all") and not whole) or (op == "amax" and before != "element"):
            raise NotPrintableError(f"the operation {name} over some of the axes")
        if op == "amax":
            return self._largest(source, before, level)
        if op == "mean" and self.narrow_means and is_along(level):
            return self.graph.add("mean", (source,), level, "float")
        total = self.graph.add("sum", (source,), level, "float")
        if op == "sum":
            return total
        if op == "any":
            return self.graph.add("gt", (Ref(total), 0.0), level, "bool")
        size = self.graph.add(*count, "scalar", "float")
        divided = "eq" if op == "all" else "div"
        return self.graph.add(divided, (Ref(total), Ref(size)), level, self._kind_of(divided))

    def _largest(self, source: Ref, before: str, level: str) -> int:
        """The largest value, NaN if there is one, which comparisons would pass over."""
        largest = self.graph.add("amax", (source,), level, "float")
        missing = Ref(self.graph.add("isnan", (source,), before, "bool"))
        counted = Ref(self.graph.add("to_float", (missing,), before, "float"))
        total = Ref(self.graph.add("sum", (counted,), level, "float"))
        some = Ref(self.graph.add("gt", (total, 0.0), level, "bool"))
        return self.graph.add("where", (some, float("nan"), Ref(largest)), level, "float")

    @staticmethod
    def _kind_of(op: str) -> str:
        return "bool" if OPERATIONS[op].gives == "b" else "float"


def _count_between(before: str, level: str) -> tuple[str, tuple[str, ...]] | None:
    """The node that says how many values a sum from one level to another adds up."""
    if (before, level) in (("element", "scalar"), ("slice", "scalar")):
        return ("numel" if before == "element" else "slices"), ()
    if (before == "element" or is_along(before)) and (level == "scalar" or is_along(level)):
        return "members", (before, level)
    return None


def _plain(args: Any) -> list:
    return [a for a in args if isinstance(a, Tensor | bool | int | float)]


class _Hypers:
    """Stands in for the scalars of a group: every hyper-parameter is an input of the graph."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def get(self, group: Mapping[str, Any], key: str, device: torch.device) -> Any:
        value = group[key]
        if value is None:
            return None
        if is_sequence(value):
            return tuple(self._recorder.number("hyper", key, i) for i in range(len(value)))
        return self._recorder.number("hyper", key, 0)


def record(
    program: Program,
    shape: torch.Size,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    share: str | None = None,
) -> tuple[Graph, bool]:
    """Run a program once on meta tensors; also return whether the graph is specific to this shape.

    shape, dtype: the parameter's. state: tensors of which shape and dtype matter.
    share: the element whose share of a sum over all parameters is wanted instead of a step.
    Inputs of the graph are `load` nodes (tensors by name), `number` (scalar state), `hyper`,
    `total` and `numel`; outputs are named as the tensors that they are written to.

    Errors: NotPrintableError, naming the first operation that the printers do not know.
    """
    recorder, outputs = trace(program, shape, dtype, state, group, share)
    if recorder.questions and share is None:
        raise NotPrintableError(f"{recorder.questions[0].node.key} needs whole tensors")
    recorder.graph.outputs = recorder.written(outputs)
    return recorder.graph.live(), recorder.watch.looked


def trace(
    program: Program,
    shape: torch.Size,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    group: Mapping[str, Any],
    share: str | None = None,
) -> "tuple[Recorder, dict[str, Tensor]]":
    """The recorder of one run, and the tensors that the run wants to write; as `record`."""
    compute = compute_dtype(dtype)
    recorder = Recorder(shape if len(shape) else torch.Size([1]), compute)
    whole = whole_keys(program, state)
    slices = _slices(program)
    like = torch.empty(shape, dtype=dtype, device="meta")
    meta = {
        name: torch.empty(recorder.slice_shape, dtype=t.dtype, device="meta")
        if name in slices
        else _values_like(program, name, like, state)
        for name, t in state.items()
        if name not in whole and not is_companion(name)
    }
    # "fp32 copies" of what is loaded: promotion is the load's, so the graph sees one dtype
    param = torch.empty(shape, dtype=compute, device="meta")
    grad = torch.empty(shape, dtype=compute, device="meta")
    live = {**group, "warmup_steps": 1.0}
    job = Job(program, param, grad, live, {}, _Hypers(recorder))  # type: ignore[arg-type]
    job.narrow = has_narrow(state)
    for name, tensor in meta.items():
        if tensor.ndim == 0 and name in program.numbers:
            job.state[name] = recorder.bind(tensor, "number", name)
        else:
            promoted = torch.empty(tensor.shape, dtype=compute, device="meta")
            job.state[name] = recorder.tensor(working(promoted), name)
    job.param, job.grad = working(param), working(grad)
    recorder.tensor(job.param, "param")
    recorder.tensor(job.grad, "grad")
    sizes = measures.Sizes(recorder.count, recorder.single, recorder.shape_of, recorder.every)
    with torch.no_grad(), measures.answering(sizes), recorder.watch, recorder:
        try:
            outputs = _run(job, recorder, share)
        except NotPrintableError:
            raise
        except (
            Exception
        ) as error:  # a transform that needs values; if it is wrong, it says so eagerly
            raise NotPrintableError(f"{type(error).__name__}: {error}") from error
    return recorder, outputs


def _values_like(program: Program, name: str, param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Stands for the values of a state, of which shape and strides matter."""
    tensor = state[name]
    shape = packed_shape(program, name, param, state)
    if shape is not None:
        return torch.empty(shape, device="meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def whole_keys(program: Program, state: Iterable[str]) -> set[str]:
    """The keys of the states that only whole transforms see."""
    found: set[str] = set()
    for node, name, declared in program.states:
        if isinstance(node, WholeNode):
            key = node.state_key(name)
            found |= {
                k for k in state if k == key or (declared.several and k.startswith(f"{key}."))
            }
    return found


def _slices(program: Program) -> set[str]:
    """The states with an entry for every k-th element, for a k above 1."""
    return {
        n.state_key(name)
        for n, name, declared in program.states
        if declared.slice_by is not None and n.transform.options[declared.slice_by] > 1
    }


def _run(job: Job, recorder: Recorder, share: str | None) -> dict[str, Tensor]:
    def answer(request: Request) -> Any:
        if isinstance(request, Call) and request.after:
            # what is done after the write is no part of a kernel
            unchanged = [None] * len(request.node.transform.states)
            return Answer(None, unchanged, 0, {}, request.vectors, request.squares)  # type: ignore[arg-type]
        if isinstance(request, Call):
            if share is not None:
                raise NotPrintableError(
                    f"{share} sums over all parameters after {request.node.key}, which needs whole "
                    "tensors"
                )
            return recorder.ask(request)
        assert isinstance(request, tuple)
        return recorder.number("total", request[0])

    outputs: dict[str, Tensor] = {}
    shares = complete(start(job, outputs.update), answer, until=share)
    if shares is None:
        return outputs
    return {share_name(share, place): t for place, t in enumerate(shares)}  # type: ignore[arg-type]
