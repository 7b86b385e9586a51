import sys
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from heavyball import chainable as C
from heavyball.core.text import MAX_DEPTH, Names, parse_chain, parse_optimizer, split_chain
from heavyball.errors import ChainError


class Recorder:
    """A transform or combinator that keeps what it was called with."""

    def __init__(self, name, call=None):
        self.name, self.call = name, call

    def __call__(self, *args, **options):
        return Recorder(self.name, (args, options))

    def __eq__(self, other):
        return (self.name, self.call) == (other.name, other.call)

    def __repr__(self):
        return f"{self.name}{self.call or ''}"


a, b = Recorder("a"), Recorder("b")
join = Recorder("join")
NAMES = Names({"a": a, "b": b}, {"join": join})


def read(text):
    return parse_chain(text, NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", (a,)),
        (" a|b\n\t| a ", (a, b, a)),
        ("(a | b) | a", (a, b, a)),
        ("a | (b | a)", (a, b, a)),
        ("a()", (a(),)),
        ("a(1, -2.5, x='y', z=None)", (a(1, -2.5, x="y", z=None),)),
        ("a(x=True, y=False, z=1e-8)", (a(x=True, y=False, z=1e-8),)),
        ("a(x=(0.9, -0.95), y=(), z=(1,))", (a(x=(0.9, -0.95), y=(), z=(1,)),)),
        ("a(x=(1, (2, 'three')),)", (a(x=(1, (2, "three"))),)),
        ("join(a, b)", (join(a, b),)),
        ("join(a | b(1), weights=(1.0, 2.0))", (join((a, b(1)), weights=(1.0, 2.0)),)),
        ("join(join(a, x=b | a), ('name', b))", (join(join(a, x=(b, a)), ("name", b)),)),
    ],
)
def test_a_chain_is_read_as_it_is_written(text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "character", "message"),
    [
        ("", None, "empty"),
        (" \n ", None, "empty"),
        ("a |", 3, "missing"),
        ("| a", 1, "missing"),
        ("a || b", 4, "expected"),
        ("a b", None, "expected"),
        ("a, b", 1, "a tuple"),
        ("c", 1, "no transform 'c'"),
        ("a | bb", 5, "nearest: b"),
        ("join", 1, "needs arguments"),
        ("join(join)", 6, "needs arguments"),
        ("1", 1, "a literal"),
        ("None", 1, "a literal"),
        ("'a'", 1, "a literal"),
        ("a.b", 2, "attribute"),
        ("a | b.c()", 6, "attribute"),
        ("a[0]", 2, "subscript"),
        ("{a}", 1, "set"),
        ("a(x={})", 5, "set"),
        ("a(x=[1])", 5, "write a tuple"),
        ("lambda: a", 7, "lambda"),
        ("a(x=lambda: 0)", 11, "lambda"),
        ("(a := b)", 4, "assignment"),
        ("a(*b)", 3, "unpacking"),
        ("a(**b)", 3, "unpacking"),
        ("a(*(1, 2))", 3, "unpacking"),
        ("9**9**9", 2, "power"),
        ("a(x=9**9**9)", 6, "power"),
        ("a + b", 3, "operator +"),
        ("a & b", 3, "operator &"),
        ("a - b", 1, "operator other than |"),
        ("-a", 1, "unary"),
        ("not a", 1, "unary"),
        ("a and b", 1, "boolean"),
        ("a < b", 3, "operator <"),
        ("a == b", 3, "comparison"),
        ("a in b", 1, "comparison"),
        ("a if b else a", 1, "conditional"),
        ("a(x=1 if b else 2)", 5, "conditional"),
        ("a(x for x in b)", 2, "comprehension"),
        ("join(x for x in b)", 5, "comprehension"),
        ("await a", 1, "await"),
        ("join((yield))", 7, "yield"),
        ("yield a", 1, "expected"),
        ("import os", 1, "expected"),
        ("a; b", 2, "operator ;"),
        ("a # | b", 3, "comment"),
        ("a\\\n| b", None, ""),
        ("a | $", None, ""),
        ("a(x=y)", 5, "write 'y' for a string"),
        ("a(x=b)", 5, "write 'b' for a string"),
        ("a(x=b(1))", 5, "not a value"),
        ("a(x=1 | 2)", 5, "not a value"),
        ("a(x=1j)", 5, "not a value"),
        ("a(x=b'x')", 5, "not a value"),
        ("a(x=...)", 5, "operator ..."),
        ("a(x=--1)", 5, "unary"),
        ("a(x=-'1')", 5, "unary"),
        ("a(x=-True)", 5, "unary"),
        ("a(x=~1)", 5, "operator ~"),
        ("a(x=f'{b}')", 5, "f-string"),
        ("a(x=1e999)", 5, "too large"),
        ("a(x=1, x=2)", 8, "twice"),
        ("a(x=1, 2)", None, "expected"),
        ("a(1)(2)", 1, "not a transform"),
        ("__import__('os')", 1, "no transform '__import__'"),
        ("__class__", 1, "no transform"),
        ("a(", 2, "not closed"),
        ("a)", 2, "not opened"),
        ("a)(", 2, "not opened"),
        ("a('x", None, ""),
        ("'''a", 1, "not closed"),
        ("a\x00", 2, "U+0000"),
        ("a\x0cb", 2, "U+000C"),
        ("\ufeffa", 1, "U+FEFF"),
        ("\uff41", 1, "FULLWIDTH LATIN SMALL LETTER A"),
        ("\u0430 | b", 1, "CYRILLIC SMALL LETTER A"),
        ("a\u200b", 2, "ZERO WIDTH SPACE"),
        ("a(x='\u202e')", 6, "U+202E"),
        ("a(x=\ud800)", 5, "U+D800"),
    ],
)
def test_everything_else_is_refused_with_its_place(text, character, message):
    with pytest.raises(ChainError) as caught:
        read(text)
    shown = str(caught.value)
    assert message in shown
    assert character is None or f"at character {character}" in shown
    assert "\n" not in shown


LONG = {
    "open parentheses": "(" * 100_000,
    "nested parentheses": "(" * 50_000 + "a" + ")" * 50_000,
    "short nest": "(" * 1500 + "a" + ")" * 1500,
    "nested calls": "join(" * 700 + "a" + ")" * 700,
    "nested tuples": "a(x=" + "(" * 1500 + "1" + ",)" * 1500 + ")",
    "one name": "a" * 1_000_000,
    "short name": "b" * 4000,
    "many elements": " | ".join(["a"] * 100_000),
    "some elements": "|".join(["a"] * 2000),
    "long number": "a(x=" + "9" * 1_000_000 + ")",
    "short number": "a(x=" + "9" * 4000 + ")",
    "huge exponent": "a(x=1" + "0" * 30 + "e" + "9" * 30 + ")",
    "minus signs": "a(x=" + "-" * 4000 + "1)",
    "not": "not " * 1000 + "a",
    "dots": "a" + ".a" * 2000,
    "quotes": "'" * 4001,
    "backslashes": "\\" * 4000,
    "NUL": "\0" * 4000,
    "newlines": "\n" * 1_000_000,
    "many arguments": "a(" + ",".join(f"x{i}=1" for i in range(1000)) + ")",
    "string": "a(x='" + "y" * 1_000_000 + "')",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_long_text_is_refused_quickly(text):
    start = time.perf_counter()
    with pytest.raises(ChainError) as caught:
        read(text)
    assert time.perf_counter() - start < 1.0
    assert len(str(caught.value)) < 300


def test_nesting_up_to_the_limit_is_read():
    text = "join(" * MAX_DEPTH + "a" + ")" * MAX_DEPTH
    assert read(text)[0].name == "join"
    with pytest.raises(ChainError, match="nested"):
        read("join(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1))


def test_a_value_that_a_transform_refuses_is_named_with_its_place():
    with pytest.raises(ChainError, match=r"(?s)betas.*at character 11: 'scale_by_adam"):
        parse_chain("exp_avg | scale_by_adam(betas=(0.9, 1.5))")
    with pytest.raises(ChainError, match="bta"):
        parse_chain("exp_avg(bta=0.9)")
    with pytest.raises(ChainError, match=r"beta=1e\+31"):
        parse_chain("exp_avg(beta=10000000000000000000000000000000)")


def test_chains_of_the_library_are_read_and_print_as_they_were_written():
    text = (
        "centralize | exp_avg(beta=0.95) | graft(scale_by_adam(betas=(0.9, 0.95)) | sign, exp_avg)"
        " | route(when(cautious, min_ndim=2), when(sign, name='*.bias'), otherwise=())"
    )
    chain = parse_chain(text)
    assert " | ".join(map(repr, chain)) == text
    assert chain[0] is C.centralize
    assert chain[1].hyper["beta"] == 0.95
    optimizer = C.ChainOpt([("w", torch.nn.Parameter(torch.ones(3, 2)))], 0.1, *chain)
    assert "graft" in repr(optimizer)


def test_every_transform_can_be_named():
    for name, transform in C.TRANSFORMS.items():
        assert parse_chain(name) == (transform,)


def test_splitting_keeps_the_text_of_each_element():
    text = " a(x='|') |(join(b | a, y=(1, 2))) | (b | c.name if 0 else a)"
    with pytest.raises(ChainError):
        split_chain(text)
    assert split_chain("a(x='|') |(join(b | a, y=(1, 2)) | b)") == [
        "a(x='|')",
        "join(b | a, y=(1, 2))",
        "b",
    ]


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("AdamW", "AdamW", {}),
        (" torch.AdamW : ", "torch.AdamW", {}),
        ("AdamW:lr=0.01,betas=(0.9, 0.95)", "AdamW", {"lr": 0.01, "betas": (0.9, 0.95)}),
        ("X:lr=(1e-3,-1),s='a:b,c'", "X", {"lr": (1e-3, -1), "s": "a:b,c"}),
        ("X:a=None,\n b=True,", "X", {"a": None, "b": True}),
    ],
)
def test_an_optimizer_is_read_with_its_arguments(text, name, options):
    assert parse_optimizer(text) == (name, options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "a.b.c",
        "a b",
        "a(1)",
        "\u0410damW",
        "A:1",
        "A:lr",
        "A:lr=x",
        "A:lr=1,lr=2",
        "A:lr=1)",
    ]
    + ["A:lr=1)|f(", "A:lr=1)(x=1", "A:**{}", "A:lr=a.b", "A:lr=[1]", "A:" + "(" * 100_000]
    + ["A" * 100_000, "A:lr=1;x=2", "A:lr=(1", "A:f(x)=1", "A:lr=__import__('os')", "A:lr=9**9**9"],
)
def test_other_optimizer_texts_are_refused(text):
    with pytest.raises(ChainError) as caught:
        parse_optimizer(text)
    assert len(str(caught.value)) < 300


def test_the_place_in_an_optimizer_text_is_counted_from_its_beginning():
    with pytest.raises(ChainError, match="at character 12: 'y'"):
        parse_optimizer("AdamW: eps=y")


def only_chain_errors(function, text):
    message = ""
    try:
        function(text)
    except ChainError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 2000


PIECES = ["a", "b", "join", "exp_avg", "|", "(", ")", ",", "=", "-", "1", "0.9", "'s'", "x", "None"]
PIECES += [" ", "\n", ".", "*", "**", "[", "]", ":", "lambda", "yield", "not", "f'{a}'", "\\", "#"]
PIECES += [
    "__class__",
    "é",
    "\0",
    '"',
    "1e999",
    "0x",
    "1_",
    "if",
    "else",
    "for",
    "in",
    "\ud800",
    ";",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=60))
@example("a(x=1_)")
@example("a(0777)")
@example("\\N{LATIN SMALL LETTER A}")
@example("a(x='\\N{nothing}')")
@example("a(x='\\ud800')")
@example("a(x=u'y', z=rb'')")
def test_no_text_raises_anything_but_a_chain_error(text):
    only_chain_errors(read, text)
    only_chain_errors(parse_chain, text)
    only_chain_errors(split_chain, text)
    only_chain_errors(parse_optimizer, text)
    only_chain_errors(parse_optimizer, "A:" + text)


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
calls = st.builds(
    lambda which, args, options: which(*args, **options),
    st.sampled_from([a, b]),
    st.lists(literals, max_size=3),
    st.dictionaries(st.sampled_from(["x", "betas", "_y"]), literals, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(calls, min_size=1, max_size=5))
def test_what_python_prints_is_read_back(chain):
    def shown(element):
        args, options = element.call
        parts = [*map(repr, args), *(f"{k}={v!r}" for k, v in options.items())]
        return f"{element.name}({', '.join(parts)})"

    assert read(" | ".join(map(shown, chain))) == tuple(chain)


def test_reading_runs_no_code(monkeypatch):
    events = []
    watching = []
    sys.addaudithook(lambda event, args: events.append(event) if watching else None)
    watching.append(True)
    for text in [
        "__import__('os').system('true')",
        "a(x=open('/etc/passwd'))",
        "eval('1')",
        "a | b",
    ]:
        only_chain_errors(read, text)
    watching.clear()
    # `compile` is how ast reads a text; nothing is executed, imported or opened.
    assert not {"exec", "import", "open", "os.system", "subprocess.Popen"} & set(events)
