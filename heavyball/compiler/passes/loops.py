"""The loop form: what a kernel does, as walks over the elements of a tensor, for a printer to spell.

`passes/lower.py` makes it of a graph and its schedule; `verify` says whether it can be right.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from heavyball.compiler.frontend.ops import OPERATIONS, NotPrintableError
from heavyball.compiler.frontend.symbols import Expr, Op, Var, parts, variables
from heavyball.compiler.passes.axes import Frame, Runs, View, is_along, run_sizes

# What says in a row how a part of a tensor lies in the whole, see `Origin.steps`.
PLACE = ("place", "width", "jump")


@dataclass(frozen=True)
class Column:
    """A tensor of the table, and how its values are kept.

    number: its place among the tensors. correction, scale: the companions that 16-bit values and codes
    have. is_root: whether it holds the roots of the values. word: for what is rounded stochastically,
    what its random bits differ by; otherwise None. signed: whether values in 4 bits may be negative.
    is_bits: whether it holds a bit for each truth value, in bytes for each row of a matrix of rank one.
    """

    name: str
    number: int
    dtype: torch.dtype
    correction: "Column | None" = None
    scale: "Column | None" = None
    is_root: bool = False
    word: int | None = None
    signed: bool = True
    is_bits: bool = False

    @property
    def code_bits(self) -> int:
        """How many bits each code has, 0 where it holds none."""
        if self.scale is None:
            return 0
        return 4 if self.scale.dtype == torch.float32 else 8

    @property
    def kept(self) -> "tuple[Column, ...]":
        """The tensor and its companions."""
        return (self, *(c for c in (self.correction, self.scale) if c is not None))


# ---- statements of a loop, at one place of it


@dataclass(frozen=True)
class Load:
    """A value of a tensor; every `step`-th one. old: as it was before the walk over all elements."""

    var: Var
    column: Column
    step: int = 1
    old: bool = False


@dataclass(frozen=True)
class Read:
    """A value of an array along some of the axes."""

    var: Var


@dataclass(frozen=True)
class Let:
    var: Var
    expr: Expr


@dataclass(frozen=True)
class Keep:
    """Write a value of the loop's own level into its array."""

    var: Var


@dataclass(frozen=True)
class Reduce:
    """Add up float64 values, count conditions, or take the largest value of the elements.

    is_mean: whether the sum is divided by how many values it has when it is complete.
    passing: whether the sum is measured only, and no value of any step is made of it.
    """

    var: Var
    how: Literal["add", "count", "max"]
    expr: Expr
    is_mean: bool = False
    passing: bool = False


@dataclass(frozen=True)
class Save:
    """Keep the value that a tensor has until the loop over every k-th element has seen it."""

    column: Column


@dataclass(frozen=True)
class Store:
    column: Column
    expr: Expr


Statement = Load | Read | Let | Keep | Reduce | Save | Store


# ---- loops and walks


@dataclass
class Loop:
    """Statements for every value of a level: all elements, every k-th, or those along some axes."""

    level: str
    body: list[Statement]

    def of(self, *kinds: type) -> list:
        """The statements of these kinds."""
        return [s for s in self.body if isinstance(s, kinds)]

    @property
    def sums(self) -> list[Reduce]:
        return self.of(Reduce)

    @property
    def arrays(self) -> list[Var]:
        """The values along other axes that it reads."""
        return sorted({s.var for s in self.of(Read)}, key=lambda v: v.index)

    @property
    def numbers(self) -> list[Var]:
        """The numbers per tensor that it reads."""
        found = {v for e in expressions(self.body) for v in variables(e) if v.level == "scalar"}
        return sorted(found, key=lambda v: v.index)

    @property
    def columns(self) -> list[Column]:
        """The tensors that it touches, with their companions."""
        found = {c for s in self.of(Load, Store, Save) for c in s.column.kept}
        return sorted(found, key=lambda c: c.number)

    @property
    def random(self) -> list[Column]:
        """The tensors that it rounds stochastically."""
        return [s.column for s in self.of(Store) if s.column.word is not None]


@dataclass(frozen=True)
class Fold:
    """An array of sums over an array of more axes, of squares if `squared`."""

    var: Var
    source: Var
    squared: bool


@dataclass
class Walk:
    """Numbers per tensor, arrays along some axes, then loops over every k-th and over all elements.

    sums: what the last two leave behind, in the order of the parts that each piece of a tensor has.
    late: whether the loop over all elements runs ahead, and so writes before the other one reads.
    """

    numbers: list[Let]
    arrays: list[Loop | Fold]
    slices: Loop | None
    elements: Loop
    sums: list[Reduce]
    late: bool

    @property
    def loops(self) -> list[Loop]:
        """The loops over elements."""
        return [*([self.slices] if self.slices else []), self.elements]

    @property
    def moved(self) -> list[str]:
        """The tensors that it reads and those that it writes; of slices only their own tensors."""
        several = [*self.loops, *(part for part in self.arrays if isinstance(part, Loop))]
        return [
            column.name
            for loop in several
            for s in loop.of(Load, Store)
            for column in s.column.kept
            if loop is not self.slices or column.name not in ("param", "grad")
        ]


@dataclass
class Kernel:
    """What one kernel does with every tensor of a table.

    tensors: every column of an address, companions too. numbers: the states that are numbers.
    final: the numbers after the last walk. written: the number that each state of `numbers` becomes.
    kept: the arrays that something later reads. slots: how many nodes the graph has; a number's place in
    a buffer is its index. counted: the step, from which random bits come. frame: the runs of a tensor,
    or None for flat memory. every: how far the elements of a slice are apart. view: the axes that runs
    are made of, where they are not the tensor's own. placed: whether tensors are parts of others, in
    whose order elements are numbered, from which random bits come.
    """

    compute: torch.dtype
    tensors: list[Column]
    numbers: list[str]
    hypers: list[tuple[str, int]]
    totals: list[str]
    walks: list[Walk]
    final: list[Let]
    written: dict[str, Var]
    kept: list[Var]
    slots: int
    counted: Var | None
    frame: Frame | None
    every: int | None
    view: View | None = None
    placed: bool = False

    @property
    def starts(self) -> Runs | None:
        """The axis with which each run begins, where values belong to some of the axes."""
        return None if self.frame is None else self.frame.starts

    @property
    def leading(self) -> tuple[str, ...]:
        """The entries of a table row before the addresses."""
        runs = () if self.frame is None else self.frame.later
        place = PLACE if self.placed else ()
        return ("numel", "group", "stream", *place, *(f"axis {axis}" for axis in runs))

    @property
    def columns(self) -> list[str]:
        """What a row of the table holds: sizes, the group, an address for each tensor and number."""
        return [*self.leading, *(c.name for c in self.tensors), *self.numbers]

    def run_sizes(self, shape: Sequence[int]) -> list[int]:
        """The sizes of all runs but the first of a tensor."""
        return run_sizes(self.starts, shape if self.view is None else self.view.of(shape))

    @property
    def parts(self) -> int:
        """The most sums that a walk leaves behind, at least 1."""
        return max([len(w.sums) for w in self.walks] + [1])


def expressions(body: list[Statement]) -> Iterator[Expr]:
    """What the statements of a body read."""
    for s in body:
        if isinstance(s, Let | Reduce | Store):
            yield s.expr
        elif isinstance(s, Keep):
            yield s.var


# ---- checks


class LoopError(NotPrintableError):
    """A kernel in the loop form that cannot be right: a fault of the library's."""


def verify(kernel: Kernel) -> None:
    """Check that values are made before they are used, that types agree, and that nothing reads what
    an earlier walk has overwritten.

    Errors: LoopError with the first fault.
    """
    _Verifier(kernel).run()


class _Verifier:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.known: set[Var] = set()  # numbers and arrays, as `_plain` has them
        self.stored: dict[Column, Expr] = {}

    def run(self) -> None:
        for walk in self.kernel.walks:
            self._numbers(walk.numbers)
            for part in walk.arrays:
                if isinstance(part, Fold):
                    self._used(part.source, self.known)
                    self.known.add(_plain(part.var))
                else:
                    self._loop(part)
                    self.known |= {_plain(s.var) for s in part.of(Keep, Reduce)}
            saved = {s.column for s in walk.elements.of(Save)}
            for loop in walk.loops:
                self._loop(loop, saved if loop is walk.slices else set())
            overwritten = {s.column for s in walk.elements.of(Store)} if walk.late else set()
            for s in walk.slices.of(Load) if walk.slices else ():
                if s.column in overwritten and not s.old:
                    raise LoopError(f"{s.column.name} is read after it was stored")
            for s in walk.sums:
                if not any(s in loop.body for loop in walk.loops):
                    raise LoopError(f"no loop computes the sum {s.var}")
                self.known.add(_plain(s.var))
        self._numbers(self.kernel.final)
        for name, var in self.kernel.written.items():
            self._used(var, self.known, name)

    def _numbers(self, lets: list[Let]) -> None:
        for let in lets:
            self._expression(let.expr, self.known)
            self._let(let)
            self.known.add(_plain(let.var))

    def _loop(self, loop: Loop, saved: set[Column] = frozenset()) -> None:  # type: ignore[assignment]
        here = {v for v in self.known if v.level == "scalar"}
        written: dict[Column, Expr] = {}
        for s in loop.body:
            if isinstance(s, Load):
                self._load(s, written, saved)
            elif isinstance(s, Read):
                self._used(s.var, self.known)
            elif isinstance(s, Let):
                self._expression(s.expr, here)
                self._let(s)
            elif isinstance(s, Reduce):
                self._expression(s.expr, here)
                kinds = {"count": torch.bool, "max": self.kernel.compute}
                wanted = kinds.get(s.how, torch.float64)
                self._agree(s.expr.dtype, wanted, f"the sum {s.var}")
            elif isinstance(s, Keep):
                self._used(s.var, here)
                if not is_along(s.var.level) or s.var.level != loop.level:
                    raise LoopError(f"{s.var} is kept in a loop over {loop.level}")
            elif isinstance(s, Store):
                self._expression(s.expr, here)
                wanted = torch.bool if s.column.is_bits else self.kernel.compute
                self._agree(s.expr.dtype, wanted, f"what is stored in {s.column.name}")
                if s.column in written or s.column in self.stored:
                    raise LoopError(f"{s.column.name} is stored twice")
                written[s.column] = s.expr
            if isinstance(s, Load | Read | Let):
                here.add(_plain(s.var))
        self.stored |= written

    def _load(self, s: Load, written: dict[Column, Expr], saved: set[Column]) -> None:
        if s.column in written:
            raise LoopError(f"{s.column.name} is read after it was stored")
        if s.column in self.stored and self.stored[s.column] != s.var:
            raise LoopError(f"{s.column.name} holds another value than {s.var}")
        if s.old and s.column not in saved:
            raise LoopError(f"no loop saves the old values of {s.column.name}")
        wanted = torch.bool if s.column.is_bits else self.kernel.compute
        if s.var.type != wanted:
            raise LoopError(f"{s.var} is loaded as another type than {wanted}")

    def _let(self, let: Let) -> None:
        self._agree(let.expr.dtype, let.var.type, f"{let.var}")

    @staticmethod
    def _agree(found: torch.dtype, wanted: torch.dtype, what: str) -> None:
        if found != wanted:
            raise LoopError(f"{what} is {found}, expected {wanted}")

    @staticmethod
    def _used(var: Var, known: set[Var], where: str = "a loop") -> None:
        if _plain(var) not in known:
            raise LoopError(f"{var} is used before it is known, in {where}")

    def _expression(self, e: Expr, known: set[Var]) -> None:
        for part in parts(e):
            if isinstance(part, Var):
                self._used(part, known)
            elif isinstance(part, Op) and part.name in OPERATIONS:
                self._operands(part)

    def _operands(self, e: Op) -> None:
        takes = OPERATIONS[e.name].takes
        if len(takes) != len(e.args):
            raise LoopError(f"{e.name} of {len(e.args)} arguments")
        numbers = {a.dtype for a, kind in zip(e.args, takes, strict=True) if kind == "n"}
        conditions = {a.dtype for a, kind in zip(e.args, takes, strict=True) if kind == "b"}
        mixed = len(numbers) > 1 or not conditions <= {torch.bool}
        if mixed and torch.int32 not in conditions:
            raise LoopError(f"{e.name} of {numbers | conditions}: types differ")


def _plain(var: Var) -> Var:
    """A value whatever type its number has: those per tensor are float64, and seen as elements are."""
    return var if var.type == torch.bool else Var(var.index, torch.float64, var.level)
