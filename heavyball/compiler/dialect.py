"""How a language spells expressions; the printers of each language build on it."""

from collections.abc import Callable

import torch

from heavyball.compiler.frontend.ops import OPERATIONS, NotPrintableError, Operation
from heavyball.compiler.frontend.symbols import Const, Expr, Number, Op, Var

Names = Callable[[Var], str]


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

    def text(self, e: Expr, names: Names) -> str:
        """An expression whose variables are called as `names` says.

        Errors: NotPrintableError for an operation that the language has no form for.
        """
        if isinstance(e, Var):
            return names(e)
        if isinstance(e, Const):
            return self.literal(e.value, e.type)
        assert isinstance(e, Op)
        if e.name in ("cast", "view"):
            source = e.args[0]
            change = self.cast if e.name == "cast" else self.view
            return change(self.text(source, names), source.dtype, e.type)
        return self.operation(e, [self.text(a, names) for a in e.args])

    def operation(self, e: Op, arguments: list[str]) -> str:
        """An operation on arguments that are spelled already."""
        form = self.form(OPERATIONS[e.name])
        if form is None:
            raise NotPrintableError(f"the operation {e.name} in {self.language}")
        constants = {"zero": 0, "one": 1, "minus": -1}
        return form.format(*arguments, **{n: self.literal(v, e.type) for n, v in constants.items()})
