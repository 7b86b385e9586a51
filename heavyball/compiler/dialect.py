"""How a language spells expressions; the printers of each language build on it."""

from collections.abc import Callable, Mapping, Sequence

import torch

from heavyball.compiler.frontend.ops import OPERATIONS, NotPrintableError, Operation
from heavyball.compiler.frontend.symbols import Const, Expr, Input, Number, Op, Var
from heavyball.compiler.passes.loops import Kernel

Names = Callable[[Var], str]
NONE: Mapping[int, str] = {}


class Dialect:
    """A language: its types, literals and conversions, and its column of the table of operations."""

    language: str
    types: dict[torch.dtype, str]

    def form(self, operation: Operation) -> str | None:
        """The operation as this language spells it."""
        raise NotImplementedError

    def literal(self, value: Number, dtype: torch.dtype) -> str:
        """A constant of exactly this type."""
        raise NotImplementedError

    def cast(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        """A number in another type."""
        raise NotImplementedError

    def view(self, text: str, source: torch.dtype, target: torch.dtype) -> str:
        """The same bits in another type."""
        raise NotImplementedError

    def nearest(self, text: str, target: torch.dtype) -> str:
        """A float32 value in 16 bits, to nearest; what is finite stays so."""
        raise NotImplementedError

    def declared(self, name: str, text: str, dtype: torch.dtype) -> str:
        """The statement that gives a value a name."""
        raise NotImplementedError

    def text(self, e: Expr, names: Names, known: Mapping[int, str] = NONE) -> str:
        """An expression whose variables are called as `names` says.

        known: what parts of it are called that have a name already, by their `id`.

        Errors: NotPrintableError for an operation that the language has no form for.
        """
        if id(e) in known:
            return known[id(e)]
        if isinstance(e, Var):
            return names(e)
        if isinstance(e, Const):
            return self.literal(e.value, e.type)
        assert isinstance(e, Op)
        source, first = e.args[0].dtype, self.text(e.args[0], names, known)
        if e.name == "cast":
            return self.cast(first, source, e.type)
        if e.name == "view":
            return self.view(first, source, e.type)
        if e.name == "nearest":
            return self.nearest(first, e.type)
        if e.name == "shift":
            return f"({first} >> {e.args[1].value})"  # type: ignore[attr-defined]
        rest = [self.text(a, names, known) for a in e.args[1:]]
        return self.operation(e, [first, *rest])

    def computed(self, results: Sequence[Expr], names: Names) -> tuple[list[str], list[str]]:
        """The statements for what several of these use, and then the text of each.

        Choices have statements of their own too: within each other they would be branches to gcc.
        """
        known: dict[int, str] = {}
        lines: list[str] = []
        for part in _named(results):
            name = f"a{len(lines)}"
            lines.append(self.declared(name, self.text(part, names, known), part.type))
            known[id(part)] = name
        return lines, [self.text(e, names, known) for e in results]

    def operation(self, e: Op, arguments: list[str]) -> str:
        """An operation on arguments that are spelled already."""
        form = self.form(OPERATIONS[e.name])
        if form is None:
            raise NotPrintableError(f"the operation {e.name} has no form in {self.language}")
        constants = {"zero": 0, "one": 1, "minus": -1}
        return form.format(*arguments, **{n: self.literal(v, e.type) for n, v in constants.items()})


def is_number(e: Expr) -> bool:
    """Whether a value is one per tensor, or made of such."""
    if isinstance(e, Op):
        return all(map(is_number, e.args))
    return not isinstance(e, Var) or e.level == "scalar"


# How loops call values, by their level; those along some of the axes begin with a w.
PREFIXES = {"scalar": "c", "element": "v", "slice": "q"}


class KernelPrinter(Dialect):
    """The shared part of the printers; each language adds its loops and the code around them."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.type = self.types[kernel.compute]

    @staticmethod
    def name(var: Var) -> str:
        """How a loop calls a value."""
        return f"{PREFIXES.get(var.level, 'w')}{var.index}"

    def expr(self, e: Expr) -> str:
        """An expression within a loop."""
        return self.text(e, self.name)

    @property
    def width(self) -> int:
        """How many numbers a group has for the kernel: hyper-parameters, sums over all parameters."""
        return len(self.kernel.hypers) + len(self.kernel.totals)

    def place_in_group(self, e: Input) -> int:
        """Where a number of the group is among these."""
        if e.name == "hyper":
            return self.kernel.hypers.index(e.args)
        return len(self.kernel.hypers) + self.kernel.totals.index(e.args[0])


def _named(results: Sequence[Expr]) -> list[Op]:
    """The choices and repeated subexpressions, each after its operands."""
    uses: dict[int, int] = {}
    order: list[Op] = []

    def visit(e: Expr) -> None:
        uses[id(e)] = uses.get(id(e), 0) + 1
        if uses[id(e)] == 1 and isinstance(e, Op):
            for a in e.args:
                visit(a)
            order.append(e)

    for e in results:
        visit(e)
    return [e for e in order if uses[id(e)] > 1 or e.name == "where"]
