"""`heavyball.create`: an optimizer by name, with groups for decay and depth."""

import fnmatch
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from heavyball.core.combine import plain_names
from heavyball.core.hyper import Interval, check_live
from heavyball.core.text import known_names, parse_optimizer
from heavyball.errors import unknown
from heavyball.optim.arguments import GroupsOf, kinds_of
from heavyball.optim.checks import nearly
from heavyball.optim.classes import ChainClass
from heavyball.optim.optimizer import ChainOpt

# The lr of a chain that is given none; presets have their own.
LR = 1e-3


def create(
    model_or_params: Any,
    what: Any,
    lr: float | Tensor | None = None,
    *,
    no_decay: str | None = None,
    layer_decay: float | None = None,
    **options: Any,
) -> ChainOpt:
    """Build an optimizer from a name, a chain as text, a class, or elements.

    model_or_params: a module, whose named parameters are used, or anything that `ChainOpt` accepts.
    what: a preset's name, case-insensitive, optionally with options ("AdamW:amsgrad=True"); a chain
        as text ("scale_by_adam(betas=(0.9, 0.95)) | cautious"); a class; an element, or a sequence
        of them.
    lr: defaults to the preset's own; 1e-3 for a chain.
    no_decay: "auto" puts weights of norms and embeddings, and all parameters with at most one dimension,
        into a separate group without weight decay. Norms and embeddings are identified by the types of
        the modules; a model with `no_weight_decay()`, as in timm, can name more parameters. Without a
        model, only the number of dimensions counts.
    layer_decay: multiply lr by `layer_decay ** (blocks + 1 - layer)`, with layer 0 for the
        embedding, i + 1 for block i, and blocks + 1 for parameters after the blocks, as in BEiT. The
        factor is part of each group's `lr`, which schedules scale. Blocks are identified by numbered
        names: "blocks.0.", "encoder.layer.0.". For timm models, the factors are those of
            `param_groups_layer_decay`.
    options: those of the preset, or of `ChainOpt`.

    Errors: ValueError for an unknown name and TypeError for an unknown option, with the nearest match;
        ValueError if `layer_decay` finds no blocks.
    """
    make, given = chosen(what, "create")
    for name in options:
        own = next((own for own in ("no_decay", "layer_decay") if nearly(name, own)), None)
        if own is not None:
            raise TypeError(f"create has no option {name!r}; did you mean {own!r}?")
    options = {**given, **options}
    if lr is not None:
        options["lr"] = lr
    if no_decay not in (None, "auto"):
        raise ValueError(f"create: no_decay={no_decay!r}: expected 'auto' or None")
    if no_decay is None and layer_decay is None:
        return make(model_or_params, **options)
    depth = None
    if layer_decay is not None:
        depth = check_live("layer_decay", layer_decay, 0.0, FACTORS)
    groups, factors, bare = _split(model_or_params, no_decay is not None, depth)
    model = model_or_params if isinstance(model_or_params, nn.Module) else None
    opt = make(groups if model is None else GroupsOf(groups, model), **options)
    for group, factor, undecayed in zip(opt.param_groups, factors, bare, strict=True):
        if factor != 1:
            group["lr"] = group["lr"] * factor
        for key in opt.chain.hyper if undecayed else ():
            if key.rpartition(".")[2] == "weight_decay":
                opt.registry.schedules.release(group, key)
                group[key] = 0.0
    for index in range(len(opt.param_groups)):
        opt.registry.schedules.settle(index, opt.param_groups)
    return opt


FACTORS = Interval(0, 1, low_open=True, high_open=False)


def chosen(what: Any, owner: str) -> tuple[Callable[..., ChainOpt], dict[str, Any]]:
    """What builds an optimizer, and the options that are part of its text.

    owner: the function to name in errors.
    """
    if isinstance(what, str):
        return _from_text(what, owner)
    if what is ChainOpt:
        raise TypeError(f"{owner}: pass the chain itself instead of ChainOpt")
    if isinstance(what, type):
        if not issubclass(what, ChainOpt):
            raise TypeError(f"{owner}: {what.__name__} is not an optimizer of heavyball")
        return functools.partial(what, lr=LR) if isinstance(what, ChainClass) else what, {}
    return _of_chain(what), {}


def _from_text(text: str, owner: str) -> tuple[Callable[..., ChainOpt], dict[str, Any]]:
    from heavyball.presets import ALL_PRESETS, NAMES  # which look for presets in this module too

    name = text.partition(":")[0].strip()
    presets = {each.lower(): preset for each, preset in NAMES.items()}
    if name.lower() in presets:
        options = parse_optimizer(text)[1] if ":" in text else {}
        return presets[name.lower()], options
    names = known_names()
    if name.isidentifier() and (":" in text or name not in names.transforms):
        known = [*ALL_PRESETS, *([] if ":" in text else names.transforms)]
        raise ValueError(f"{owner}: {unknown('optimizer', name, known)}")
    return _of_chain(text), {}


def _of_chain(what: Any) -> Callable[..., ChainOpt]:
    def make(params: Any, lr: float | Tensor = LR, **options: Any) -> ChainOpt:
        return ChainOpt(params, lr, transforms=what, **options)

    return make


# ---- groups

Named = tuple[str | None, Tensor]
# What a parameter's group is: that it was given in, its factor of lr, and whether it has no decay.
Kind = tuple[int, float, bool]
_NUMBERED = re.compile(r"^(.*?)(?:^|\.)(\d+)\.")
# Parts of the names of what is before the blocks, and of what is behind them.
FIRST = ("embed", "embd", "emb", "wte", "wpe", "token", "pos", "patch", "stem")
BLOCKS = ("blocks", "layers", "layer", "h")
LAST = ("head", "logits", "classifier", "score", "output", "fc", "final", "ln_f")


def _split(
    given: Any, bare: bool, factor: float | None
) -> tuple[list[dict[str, Any]], list[float], list[bool]]:
    """Parameter groups, the factor of each one's lr, and whether it has no decay."""
    model = given if isinstance(given, nn.Module) else None
    groups = _as_groups(given if model is None else list(model.named_parameters()))
    named = [(n, p) for group in groups for n, p in group["params"]]
    names = [name for name, _ in named]
    if factor is not None and None in names:
        raise ValueError(
            "create: layer_decay needs names: pass the model, or model.named_parameters()"
        )
    plain = names if None in names else plain_names(names)  # type: ignore[arg-type]
    kinds = {} if model is None else kinds_of(model)
    kept = _kept(model)
    powers = None if factor is None else _own_powers(model, plain) or _powers(plain, kinds)  # type: ignore[arg-type]
    layers = iter([None] * len(names) if powers is None else powers)
    found: dict[Kind, list[Named]] = {}
    numbered = [(i, pair) for i, group in enumerate(groups) for pair in group["params"]]
    for (index, pair), name in zip(numbered, plain, strict=True):
        power = next(layers)
        scale = 1.0 if power is None else factor**power  # type: ignore[operator]
        undecayed = bare and (pair[1].ndim <= 1 or name in kinds or _is_kept(name, kept))
        found.setdefault((index, scale, undecayed), []).append(pair)
    made = []
    for (index, _, _), pairs in found.items():
        params = pairs if None not in names else [param for _, param in pairs]
        made.append({**groups[index], "params": params})
    return made, [scale for _, scale, _ in found], [undecayed for *_, undecayed in found]


def _inside(model: nn.Module | None) -> nn.Module | None:
    """The model without its wrappers."""
    while model is not None:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module) or len(list(model.children())) > 1:
            break
        model = inner
    return model


def _kept(model: nn.Module | None) -> tuple[str, ...]:
    """Name patterns of parameters that a model wants without decay, as timm's models list them."""
    own = getattr(_inside(model), "no_weight_decay", None)
    return tuple(own()) if callable(own) else ()


def _is_kept(name: str | None, patterns: tuple[str, ...]) -> bool:
    return name is not None and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _own_powers(model: nn.Module | None, names: Sequence[str]) -> list[int] | None:
    """For each parameter the number of layers after its own, for a model that timm groups."""
    inner = _inside(model)
    matcher = getattr(inner, "group_matcher", None)
    if not callable(matcher):
        return None
    try:
        from timm.models import group_parameters
    except ImportError:  # a model of somebody else
        return None
    found = group_parameters(inner, matcher(coarse=False), reverse=True)
    layers = dict(zip(plain_names(list(found)), found.values(), strict=True))
    return [max(layers.values()) - layers[name] for name in names]


def _as_groups(given: Any) -> list[dict[str, Any]]:
    """Groups of (name, parameter) pairs, the name None where there is none."""
    entries = list(given)
    if not any(isinstance(entry, Mapping) for entry in entries):
        entries = [{"params": entries}]
    groups = []
    for entry in entries:
        params = entry["params"]
        several = [params] if isinstance(params, Tensor) else list(params)
        names = entry.get("param_names")
        names = [None] * len(several) if names is None else names
        pairs = [
            pair if isinstance(pair, tuple) else (name, pair)
            for name, pair in zip(names, several, strict=True)
        ]
        rest = {k: v for k, v in entry.items() if k not in ("params", "param_names")}
        groups.append({**rest, "params": pairs})
    return groups


def _powers(names: Sequence[str], kinds: Mapping[str, str]) -> Iterator[int]:
    """For each parameter the number of layers after its own."""
    blocks = _blocks(names)
    if not blocks:
        raise ValueError(
            "create: layer_decay: no names have numbered blocks, as in 'blocks.0.weight'; the "
            "first names are "
            f"{', '.join(map(repr, names[:3]))}"
        )
    first = next(i for i, name in enumerate(names) if name in blocks)
    last = max(blocks.values()) + 1
    for place, name in enumerate(names):
        if name in blocks:
            layer = blocks[name]
        else:
            parts = name.lower().split(".")
            is_last = any(part.startswith(LAST) or part.endswith("_head") for part in parts)
            is_first = any(part in path for path in parts for part in FIRST) or (
                "embedding" in kinds.get(name, "").lower()
            )
            layer = 0 if is_first or (not is_last and place < first) else last
        yield last - layer


def _blocks(names: Sequence[str]) -> dict[str, int]:
    """The layer, from 1, of each parameter in a block: lists of several blocks, one after the other."""
    lists: dict[str, dict[str, int]] = {}
    for name in names:
        match = _NUMBERED.match(name)
        if match:
            lists.setdefault(match[1], {})[name] = int(match[2])
    found: dict[str, int] = {}
    for path, members in lists.items():
        last = path.lower().rpartition(".")[2]
        several = len(set(members.values())) > 1 or last in BLOCKS
        if several and not any(part in last for part in FIRST + LAST):
            before = max(found.values(), default=0)
            found |= {name: before + number + 1 for name, number in members.items()}
    return found
