"""Parse chains and optimizer specifications from text, without evaluating it.

    chain    exp_avg | scale_by_adam(betas=(0.9, 0.95)) | graft(sign, exp_avg | scale_by_adam)
    optimizer    AdamW:lr=0.01,betas=(0.9, 0.95)        torch.SGD:momentum=0.9

The text is checked token by token against a short list of allowed tokens, then parsed by `ast`; only
names, calls, `|`, tuples and literals are accepted in the tree. Only names of transforms and combinators
are looked up.
"""

import ast
import io
import math
import re
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from heavyball.core.hyper import is_sequence
from heavyball.core.shapes import SHAPES, beta_of_batch, beta_of_half_life
from heavyball.errors import REFUSALS, ChainError, one_line, unknown

MAX_LENGTH = 4096
MAX_DEPTH = 16
MAX_ELEMENTS = 64
MAX_TOKENS = 1024
# A number this long fits a float, so no value can overflow on the way to one.
MAX_NUMBER = 32

# What stands for a number: schedules, and betas in other units.
NUMBERS: dict[str, Callable[..., Any]] = {
    **SHAPES,
    "beta_of_half_life": beta_of_half_life,
    "beta_of_batch": beta_of_batch,
}
_OPERATORS = frozenset("(),|=-")
_FORBIDDEN = {
    ".": "attribute access",
    "[": "a subscript or list (write a tuple)",
    "{": "a set or dictionary",
    ":": "a lambda or slice",
    ":=": "an assignment expression",
    "*": "an unpacking or multiplication",
    "**": "an unpacking or power",
    "==": "a comparison",
}
_NODES = {
    ast.Constant: "a literal",
    ast.Tuple: "a tuple",
    ast.JoinedStr: "an f-string",
    ast.GeneratorExp: "a comprehension",
    ast.IfExp: "a conditional expression",
    ast.BoolOp: "a boolean operator",
    ast.Compare: "a comparison",
    ast.BinOp: "an operator other than |",
    ast.UnaryOp: "a unary operator",
    ast.Await: "await",
    ast.Yield: "yield",
    ast.YieldFrom: "yield",
}
_SPECIFICATION = re.compile(
    r"\s*([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)\s*(?::(.*))?", re.DOTALL | re.ASCII
)


@dataclass(frozen=True)
class Names:
    """What a chain may name: transforms, combinators, which take chains as arguments, and values."""

    transforms: Mapping[str, Any]
    combinators: Mapping[str, Callable[..., Any]]
    values: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


def known_names() -> Names:
    """The transforms and combinators of `heavyball.chainable`, and functions that make values."""
    from heavyball import chainable
    from heavyball.presets.low_rank import HasRank
    from heavyball.presets.muon import IsHidden, IsNamed

    combinators: dict[str, Any] = chainable.COMBINATORS
    predicates = {t.__name__: t for t in (IsHidden, IsNamed, HasRank)}
    values: dict[str, Any] = {"shared": chainable.shared, **predicates}
    values |= NUMBERS
    return Names(chainable.TRANSFORMS, combinators, values)


def parse_chain(text: str, names: Names | None = None) -> tuple[Any, ...]:
    """The elements of a chain written as text, each a configured transform.

    Grammar: chain = element ("|" element)*; element = name | name(argument, key=argument, ...);
    an argument is a number, inf, string, True, False, None or a tuple of these, a value such as
    shared('betas', (0.9, 0.99), 0) or a schedule such as cosine(1000, floor=0.1), and for a combinator
    also a chain (one element as itself, several as a tuple).
    Errors: ChainError naming the offending piece and its position, counted in characters from 1.
    """
    reader = _Reader("chain", text)
    return reader.chain(reader.tree(), names or known_names(), 0)


def read_elements(given: Any) -> tuple[Any, ...]:
    """Elements of a chain, with those that are text read.

    given: an element, a text, or a sequence of both.
    Errors: ChainError as for `parse_chain`.
    """
    several = given if is_sequence(given) else (given,)
    parts = (parse_chain(part) if isinstance(part, str) else (part,) for part in several)
    return tuple(element for part in parts for element in part)


def split_chain(text: str) -> list[str]:
    """The text of each element at the top of a chain.

    Errors: ChainError as for `parse_chain`, but names are not looked up.
    """
    reader = _Reader("chain", text)
    return [reader.piece(node) for node in reader.elements(reader.tree())]


def parse_optimizer(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the arguments of `NAME` or `NAME:key=value,...`; a schedule is a value too.

    Errors: ChainError naming the offending piece and its position.
    """
    match = _SPECIFICATION.fullmatch(text[: MAX_LENGTH + 1])
    if len(text) > MAX_LENGTH or match is None:
        shown = text if len(text) <= 60 else text[:60] + "..."
        raise ChainError(f"not an optimizer: {shown!r}; expected NAME or NAME:key=value,...")
    name, arguments = match.groups()
    if arguments is None or not arguments.strip():
        return name, {}
    # The call is only a way to read keyword arguments; its name is never looked up.
    reader = _Reader("arguments", f"f({arguments})", offset=match.start(2) - 2)
    call = reader.tree()
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise reader.error("expected key=value, ...", call)
    if call.args:
        raise reader.error("expected key=value, found a value without a name", call.args[0])
    return name, reader.keywords(call, Names({}, {}, NUMBERS), 0)


class _Reader:
    """One text, its syntax tree, and the errors that point into it."""

    def __init__(self, kind: str, text: str, offset: int = 0) -> None:
        self.kind, self.offset = kind, offset
        if len(text) > MAX_LENGTH:
            raise ChainError(
                f"the {kind} has {len(text)} characters, at most {MAX_LENGTH} are read"
            )
        spaced = text.translate({ord(c): " " for c in "\t\r\n"})
        self.text = spaced.strip()
        self.offset += len(spaced) - len(spaced.lstrip())
        if not self.text:
            raise ChainError(f"the {kind} is empty")

    def error(self, message: str, where: ast.AST | int) -> ChainError:
        """A ChainError that quotes the text from `where` on."""
        start = where if isinstance(where, int) else getattr(where, "col_offset", 0)
        piece = self.piece(where) if isinstance(where, ast.AST) else self.text[start:]
        piece = piece if len(piece) <= 40 else piece[:40] + "..."
        found = f": {piece!r}" if piece else ", the end"
        return ChainError(
            f"cannot read the {self.kind}: {message}, at character {start + self.offset + 1}{found}"
        )

    def piece(self, node: ast.AST) -> str:
        """The text that a node was read from."""
        return self.text[getattr(node, "col_offset", 0) : getattr(node, "end_col_offset", None)]

    def tree(self) -> ast.expr:
        """The syntax tree of the text, after every token was found to be allowed."""
        self._check_characters()
        self._check_tokens()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            raise self.error("expected name(...) | name(...)", (error.offset or 1) - 1) from None
        except (ValueError, RecursionError, MemoryError, OverflowError) as error:
            raise ChainError(f"cannot read the {self.kind}: {one_line(error)}") from None

    def _check_characters(self) -> None:
        # ASCII only: Python would normalise a look-alike letter to the plain one.
        for position, character in enumerate(self.text):
            if not " " <= character <= "~":
                name = unicodedata.name(character, "control character")
                raise self.error(f"{name} (U+{ord(character):04X}) is not allowed", position)

    def _check_tokens(self) -> None:
        opened: list[int] = []
        try:
            tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
            for count, token in enumerate(tokens, start=1):
                if token.type in _ENDS or token.string == " ":
                    continue
                self._check_token(token, token.start[1], opened)
                if count > MAX_TOKENS:
                    message = f"there are more than {MAX_TOKENS} words and signs"
                    raise self.error(message, token.start[1])
        except (tokenize.TokenError, SyntaxError):
            if opened:
                raise self.error("a parenthesis is not closed", opened[-1]) from None
            raise self.error("a quote is not closed, or a sign is out of place", 0) from None
        if self.text.startswith("|") or self.text.endswith("|"):
            at = 0 if self.text.startswith("|") else len(self.text) - 1
            raise self.error("an element is missing next to |", at)

    def _check_token(self, token: tokenize.TokenInfo, position: int, opened: list[int]) -> None:
        if token.type == tokenize.OP and token.string not in _OPERATORS:
            what = _FORBIDDEN.get(token.string, f"the operator {token.string}")
            raise self.error(f"{what} is not allowed", position)
        if token.type == tokenize.COMMENT:
            raise self.error("a comment is not allowed", position)
        if token.type == tokenize.NUMBER and len(token.string) > MAX_NUMBER:
            raise self.error(f"a number has more than {MAX_NUMBER} characters", position)
        if token.type not in _TOKENS:
            # From Python 3.12 on, an f-string has tokens of its own.
            is_format = tokenize.tok_name[token.type].startswith("FSTRING")
            what = "an f-string" if is_format else "an unexpected character"
            raise self.error(f"{what} is not allowed", position)
        if token.string == "(":
            opened.append(position)
        if len(opened) > MAX_DEPTH:
            raise self.error(f"parentheses are nested more than {MAX_DEPTH} deep", position)
        if token.string == ")":
            if not opened:
                raise self.error("a parenthesis is closed that was not opened", position)
            opened.pop()

    def elements(self, node: ast.expr) -> list[ast.expr]:
        """The elements that `|` joins, in order; a loop, as the tree is as deep as it is long."""
        found = []
        pending = [node]
        while pending:
            node = pending.pop()
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
                pending += [node.left, node.right]
            else:
                found.append(node)
            if len(found) + len(pending) > MAX_ELEMENTS:
                raise ChainError(f"the {self.kind} has more than {MAX_ELEMENTS} elements")
        return found[::-1]

    def chain(self, node: ast.expr, names: Names, depth: int) -> tuple[Any, ...]:
        return tuple(self._element(item, names, depth) for item in self.elements(node))

    def _element(self, node: ast.expr, names: Names, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.error(f"chains are nested more than {MAX_DEPTH} deep", node)
        called = node.func if isinstance(node, ast.Call) else node
        if not isinstance(called, ast.Name):
            what = _NODES.get(type(called), "this expression")
            raise self.error(f"{what} is not a transform", called)
        combines = called.id in names.combinators
        if not combines and called.id not in names.transforms:
            # as an argument a schedule may be meant
            known = [*names.transforms, *names.combinators, *(names.values if depth else ())]
            raise self.error(unknown("transform", called.id, known), called)
        if not isinstance(node, ast.Call):
            if combines:
                raise self.error(f"{called.id} needs arguments, {called.id}(...)", called)
            return names.transforms[called.id]
        within = names if combines else replace(names, transforms={}, combinators={})
        args = [self._value(arg, within, depth + 1) for arg in node.args]
        options = self.keywords(node, within, depth + 1)
        target = names.combinators[called.id] if combines else names.transforms[called.id]
        try:
            return target(*args, **options)
        except REFUSALS as error:
            raise self.error(one_line(error), node) from None

    def keywords(self, call: ast.Call, names: Names | None, depth: int) -> dict[str, Any]:
        """The keyword arguments of a call; with `names`, a chain may be a value."""
        values: dict[str, Any] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in values:
                raise self.error(f"{keyword.arg or '**'} is given twice", keyword)
            values[keyword.arg] = self._value(keyword.value, names, depth)
        return values

    def _value(self, node: ast.expr, names: Names | None, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.error(f"values are nested more than {MAX_DEPTH} deep", node)
        if isinstance(node, ast.Constant) and type(node.value) in _LITERALS:
            if node.value in (math.inf, -math.inf):
                raise self.error("the number is too large", node)
            return node.value
        if isinstance(node, ast.UnaryOp) and _is_negated_number(node):
            return -ast.literal_eval(node.operand)
        if isinstance(node, ast.Tuple):
            return tuple(self._value(item, names, depth + 1) for item in node.elts)
        if isinstance(node, ast.Name) and node.id == "inf" and names is not None:
            return math.inf
        if names is not None and isinstance(node, ast.Call) and _called(node) in names.values:
            return self._made(node, names, depth)
        chains = names is not None and (names.transforms or names.combinators)
        if names is not None and chains and isinstance(node, (ast.Name, ast.Call, ast.BinOp)):
            chain = self.chain(node, names, depth)
            return chain[0] if len(chain) == 1 else chain
        if names is not None and names.values and isinstance(node, ast.Call) and _called(node):
            raise self.error(unknown("schedule", _called(node), names.values), node)
        if isinstance(node, ast.Name):
            raise self.error(f"a value is expected, write {node.id!r} for a string", node)
        what = _NODES.get(type(node), "this expression")
        raise self.error(f"{what} is not a value, expected a number, string or tuple", node)

    def _made(self, node: ast.Call, names: Names, depth: int) -> Any:
        """A value that a call gives, of values alone."""
        plain = replace(names, transforms={}, combinators={})
        args = [self._value(arg, plain, depth + 1) for arg in node.args]
        options = self.keywords(node, plain, depth + 1)
        try:
            return names.values[_called(node)](*args, **options)
        except REFUSALS as error:
            raise self.error(one_line(error), node) from None


def _called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _is_negated_number(node: ast.UnaryOp) -> bool:
    return (
        isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and type(node.operand.value) in (int, float)
    )


_LITERALS = (bool, int, float, str, type(None))
_ENDS = frozenset({tokenize.NEWLINE, tokenize.NL, tokenize.ENDMARKER})
_TOKENS = frozenset({tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP})
