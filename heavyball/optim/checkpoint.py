"""What a saved optimizer is: its description, whether it fits, and how older ones are brought up.

A state dict is torch's, `state` and `param_groups`, and a description: `heavyball`, with the version of
the format and the chain. Each function here works on plain dicts; `ChainOpt` calls them.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.combine import Parallel, Route, When, Within, plain_names
from heavyball.core.program import Fork, Node, Program, visible
from heavyball.core.schedule import SCHEDULES
from heavyball.core.transform import Transform
from heavyball.optim.scheduling import BEGUN, texts
from heavyball.runtime.meta import Remembering
from heavyball.runtime.rates import WAITING
from heavyball.runtime.state import add_missing_state, value_shape
from heavyball.state.held import (
    fault,
    is_companion,
    is_packed,
    is_real,
    layout,
    main_of,
    recode,
)

VERSION = 2
DESCRIPTION = "heavyball"
# A copy of the weights that are trained, held while the parameters hold an average.
SAVED_WEIGHTS = "train_param"

Migration = Callable[[dict[str, Any]], dict[str, Any]]
# What brings a state dict from this version to the next.
MIGRATIONS: dict[int, Migration] = {}


class LoadResult(NamedTuple):
    """What `load_state_dict` left, as `<parameter>.<key>` and `param_groups.<number>.<entry>`.

    missing_keys: what the optimizer has and the state dict has not; it stays as it was.
    unexpected_keys: what the state dict has and the optimizer has no place for.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


# ---- the description


def description(chain: Chain) -> dict[str, Any]:
    """The description in a state dict."""
    return {"version": VERSION, "chain": structure(chain)}


def describe(saved: dict[str, Any], chain: Chain) -> None:
    """Convert torch's state dict to plain values, and add the description."""
    for group in saved["param_groups"]:
        if SCHEDULES in group:
            group[SCHEDULES] = texts(group[SCHEDULES])
    saved["param_groups"] = [plain(group) for group in saved["param_groups"]]
    passing = {
        node.state_key(name)
        for program in chain.programs
        for node, name, declared in program.states
        if declared.passing
    }
    saved["state"] = {
        n: plain({key: value for key, value in state.items() if key not in passing})
        for n, state in saved["state"].items()
    }
    saved[DESCRIPTION] = description(chain)
    for group in saved["param_groups"]:
        for key in (WAITING, BEGUN):  # the step that has begun goes on
            if key in group:
                group[key] = dict(group[key])


def structure(chain: Chain) -> str:
    """The chain as text, without live hyper-parameters: those are in the groups, and may change."""
    if len(chain.programs) == 1:
        return _joined(visible(chain.programs[0].nodes))
    return _joined(chain.elements)


def _joined(chain: Iterable[Any]) -> str:
    return " | ".join(_text(item) for item in chain if not _only_measures(item)) or "()"


def _only_measures(item: Any) -> bool:
    """Whether an element has no effect on a step."""
    transform = item.transform if isinstance(item, Node) else item
    states = transform.states.values() if isinstance(transform, Transform) else ()
    return bool(states) and all(state.passing for state in states)


def _text(item: Any) -> str:
    if isinstance(item, Transform):
        given = {n: v for n, v in item.options.items() if v is not item.defaults.get(n)}
        shown = [f"{n}={_text(v)}" for n, v in given.items() if v != item.defaults.get(n)]
        return f"{item.name}({', '.join(shown)})" if shown else item.name
    if isinstance(item, Node):
        return _text(item.transform)
    if isinstance(item, Fork | Parallel):
        name = item.merge.transform.name if isinstance(item, Fork) else item.name
        return f"{name}({', '.join(map(_joined, item.branches))})"
    if isinstance(item, Route):
        rest = [] if item.otherwise is None else [f"otherwise={_joined(item.otherwise)}"]
        return f"route({', '.join([*map(_text, item.rules), *rest])})"
    if isinstance(item, Within):
        return f"{item.name}({_joined((item.enter, *item.chain, item.leave))})"
    if isinstance(item, When):
        return f"when({', '.join([_joined(item.chain), *_conditions(item)])})"
    if isinstance(item, tuple | list):
        return f"({', '.join(map(_text, item))})"
    # the address in a function's repr is another one in every process
    return getattr(item, "description", None) or getattr(item, "__qualname__", None) or repr(item)


def _conditions(rule: When) -> Iterable[str]:
    for name in ("name", "ndim", "min_ndim", "max_ndim", "predicate"):
        if getattr(rule, name) is not None:
            yield f"{name}={_text(getattr(rule, name))}"


def plain(value: Any) -> Any:
    """A value with Python's numbers and tuples: schedules leave numpy's, configurations lists."""
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        found = {key: plain(v) for key, v in value.items()}
        return found if any(found[k] is not v for k, v in value.items()) else value
    if type(value) in (list, tuple):
        parts = [plain(v) for v in value]
        same = all(a is b for a, b in zip(parts, value, strict=True))
        return value if same else type(value)(parts)
    if isinstance(value, Sequence) and not isinstance(
        value, str | bytes | bytearray | tuple | list
    ):
        return tuple(map(plain, value))
    return value


def owner(key: str) -> str:
    """The transform that a state key belongs to: `exp_avg.1` for `exp_avg.1.mean`."""
    name, *rest = key.split(".")
    return f"{name}.{rest[0]}" if rest and rest[0].isdigit() else name


# ---- versions


def migration(version: int) -> Callable[[Migration], Migration]:
    """Register a function that brings a state dict from `version` to `version + 1`.

    It gets a dict of its own, whose tensors are those of the caller: it may replace, not write into
    them. The description's version is set for it.
    """

    def register(fn: Migration) -> Migration:
        if version in MIGRATIONS:
            raise ValueError(f"a migration from version {version} is already registered")
        MIGRATIONS[version] = fn
        return fn

    return register


def migrate(state_dict: Mapping[str, Any], version: int | None = None) -> dict[str, Any]:
    """The state dict as this version of the library writes it; the one given is left as it is.

    version: what it was written as. A dict without a description, as
        `torch.distributed.checkpoint.state_dict` makes them, is taken to be current otherwise.

    Errors: ValueError for a version that is not known.
    """
    moved = _own(state_dict)
    described = moved.get(DESCRIPTION)
    if described is None and version is None:
        return moved
    if version is None:
        version = described.get("version") if isinstance(described, dict) else described
    if not isinstance(version, int) or isinstance(version, bool):
        raise ValueError(
            f"load_state_dict: version {version!r} in the state dict, expected a number"
        )
    if version > VERSION:
        raise ValueError(
            f"load_state_dict: the state dict has version {version}, and this heavyball reads up to "
            f"{VERSION}: load it with the release that wrote it, or a newer one"
        )
    for number in range(version, VERSION):
        if number not in MIGRATIONS:
            raise ValueError(
                f"load_state_dict: there is no migration from version {number} to {number + 1}"
            )
        moved = MIGRATIONS[number](moved)
        if isinstance(moved.get(DESCRIPTION), dict):
            moved[DESCRIPTION]["version"] = number + 1
    return moved


def _own(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy down to the tensors, which are shared."""
    for entry in ("state", "param_groups"):
        if entry not in state_dict:
            raise ValueError(f"load_state_dict: {entry!r} is missing in the state dict")
    found = dict(state_dict)
    found["state"] = {
        n: {k: _number(v) for k, v in s.items()} if isinstance(s, Mapping) else s
        for n, s in state_dict["state"].items()
    }
    found["param_groups"] = [_named(group) for group in state_dict["param_groups"]]
    if isinstance(found.get(DESCRIPTION), dict):
        found[DESCRIPTION] = dict(found[DESCRIPTION])
    return found


def _named(group: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a group; if its parameters are given by name, these are the names.

    `torch.distributed.checkpoint` makes groups anew, as those of the optimizer that loads, and leaves
    them the names that another group or another order had.
    """
    made = dict(group)
    if made.get("params") and all(isinstance(n, str) for n in made["params"]):
        names = made.pop("param_names", None)
        if names is not None and set(plain_names(names)) == set(plain_names(made["params"])):
            made["param_names"] = list(made["params"])
    return made


def _number(value: Any) -> Any:
    """Numbers as tensors: torch's optimizers load a count of steps in either form."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return torch.tensor(value, dtype=torch.float64, device="cpu") if plain else value


def rename_transform(state_dict: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """For a migration: the state, the group entries and the description under a transform's new name."""
    key = re.compile(rf"^{re.escape(old)}(?=\.|$)")
    word = re.compile(rf"(?<![\w.]){re.escape(old)}(?!\w|=)")
    renamed = {
        n: {key.sub(new, k): v for k, v in state.items()}
        for n, state in state_dict["state"].items()
    }
    # `exp_avg.1.beta` is an entry of the transform; `beta` alone is not, whatever it is called
    entry = re.compile(rf"^{re.escape(old)}(?=\.)")
    groups = [{entry.sub(new, k): v for k, v in g.items()} for g in state_dict["param_groups"]]
    changed = {**state_dict, "state": renamed, "param_groups": groups}
    if isinstance(state_dict.get(DESCRIPTION), dict):
        described = state_dict[DESCRIPTION]
        changed[DESCRIPTION] = {**described, "chain": word.sub(new, described["chain"])}
    return changed


# ---- what fits


def expected_state(
    program: Program, param: Tensor, group: Mapping[str, Any], all_lazy: bool = False
) -> dict[str, Tensor]:
    """The state that a parameter would be given now, as tensors without memory.

    all_lazy: also what it would be given under other values of the group.
    """
    expected: dict[str, Tensor] = {}
    with Remembering():
        add_missing_state(program, param.detach().to("meta"), group, expected, all_lazy)
    return expected


def misfits(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    program: Program,
    param: Tensor,
    shapes: Callable[[str], torch.Size],
    full: Mapping[str, Tensor] | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Missing keys, unexpected keys, and faults of the others.

    shapes: of the values, by key, see `value_shapes`. full: what state there could be under other values
    of the group.
    """
    lazy = program.lazy_keys
    # a tensor in another format is brought into this one, so its companions are no keys of their own
    both = found.keys() & expected.keys()
    missing = [k for k in expected if k not in found and k not in lazy and main_of(k) not in both]
    extra = [
        k
        for k in found
        if k not in expected and k not in lazy and k != SAVED_WEIGHTS and main_of(k) not in both
    ]
    wrong = []
    for key, tensor in found.items():
        if is_companion(key) and main_of(key) in both:
            continue
        known = expected if key in expected or full is None else full
        like = param if key == SAVED_WEIGHTS else known.get(key)
        if like is None:
            continue
        if not isinstance(tensor, Tensor):
            wrong.append(f"{key!r} is a {type(tensor).__name__}, expected a tensor")
            continue
        shape = like.shape if key == SAVED_WEIGHTS or is_companion(key) else shapes(key)
        if not is_packed(found, key) and tensor.shape != shape:
            wrong.append(f"{key!r} has the shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        elif not is_companion(key) and (broken := fault(found, key, shape)):
            wrong.append(broken)
        elif key != SAVED_WEIGHTS and not _convertible(found, known, key):
            wrong.append(f"{key!r} is {tensor.dtype}, expected {like.dtype}")
    return missing, extra, wrong


def convert(
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    program: Program,
    shapes: Callable[[str], torch.Size],
) -> None:
    """Give every tensor the dtype, or the format of fewer bits, that is expected of it.

    shapes: of the values, by key.
    """
    recode(state, expected, program.holds_of, shapes)


def value_shapes(
    program: Program, param: Tensor, expected: Mapping[str, Tensor]
) -> Callable[[str], torch.Size]:
    """Gives the shape of the values of each state that is expected of a parameter, by key."""

    def shape(key: str) -> torch.Size:
        if is_packed(expected, key):
            return value_shape(program, key, param)
        return expected[key].shape

    return shape


def _convertible(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], key: str) -> bool:
    same = layout(found, key) == layout(expected, key)
    return same or (is_real(found, key) and is_real(expected, key))


def by_transform(keys: Iterable[str]) -> str:
    """State keys in words: `scale_by_adam (exp_avg, exp_avg_sq)`, or `none`."""
    parts: dict[str, list[str]] = defaultdict(list)
    for key in dict.fromkeys(keys):
        name = owner(key)
        parts[name].append(key.removeprefix(name).removeprefix("."))
    shown = [f"{n} ({', '.join(v)})" if v != [""] else n for n, v in parts.items()]
    return ", ".join(shown) or "none"
