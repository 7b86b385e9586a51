"""Fits a state dict to an optimizer: all of it or an error, or what matches and a list of the rest."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from heavyball import migrations  # noqa: F401  (it registers them)
from heavyball.chain import BOOKKEEPING, Program
from heavyball.checkpoint import (
    DESCRIPTION,
    SAVED_WEIGHTS,
    LoadResult,
    by_transform,
    expected_state,
    misfits,
    structure,
)
from heavyball.checks import describe, labelled
from heavyball.runner import add_missing_state

if TYPE_CHECKING:
    from heavyball.optimizer import ChainOpt

HINT = "load_state_dict(..., strict=False) loads what matches and returns what it left"


@dataclass
class Match:
    """A parameter of the optimizer, and the state that was saved for it, if any."""

    label: str
    short: str
    param: Tensor
    program: Program
    group: Mapping[str, Any]
    known: bool
    saved: Mapping[str, Any]
    expected: dict[str, Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def compare(self) -> None:
        self.expected = expected_state(self.program, self.param, self.group)
        if self.saved:
            found = misfits(self.saved, self.expected, self.program, self.param)
            self.missing, self.extra, self.wrong = found

    def lacks_weights(self) -> bool:
        """Whether the parameters hold an average and nothing holds what it is an average of."""
        evaluating = not self.group.get("train_mode", True) and self.program.evaluators
        return bool(evaluating and SAVED_WEIGHTS not in self.saved and self.saved.get("step"))

    def usable(self) -> dict[str, Any]:
        """What of the saved state can be loaded."""
        taken = {k: v for k, v in self.saved.items() if k not in self.extra}
        if not self.program.evaluators:
            taken.pop(SAVED_WEIGHTS, None)
        # a count of steps without what was gathered in them would be worse than nothing
        if self.wrong or (self.missing and taken.keys() <= {"step", SAVED_WEIGHTS}):
            return {}
        return taken


def fit(
    opt: "ChainOpt", loading: dict[str, Any], strict: bool
) -> tuple[dict[str, Any], LoadResult]:
    """The part of a state dict that is to be loaded, in torch's form, and what was left of it.

    Errors: ValueError with `strict` if anything is left; else if it cannot be said which parameter is
        which. Nothing has been changed then.
    """
    counts = [[len(g["params"]) for g in gs] for gs in (loading["param_groups"], opt.param_groups)]
    _refuse_other_groups(counts[0], counts[1], strict)
    matches = list(_matches(opt, loading, _by_name(opt, loading, counts) if not strict else None))
    for match in matches:
        match.compare()
    for match in matches:
        if match.lacks_weights():
            raise ValueError(
                f"load_state_dict: the state saved for {match.label} is of evaluation mode, but the "
                f"weights to train on with, {SAVED_WEIGHTS!r}, are missing; see docs/checkpoints.md"
            )
    if strict:
        _refuse(opt, loading, matches)
        return loading, LoadResult([], [])
    if not opt._training():
        raise RuntimeError("load_state_dict(strict=False) in evaluation mode: call train() first")
    return _partial(opt, loading, matches)


def _refuse_other_groups(saved: list[int], own: list[int], strict: bool) -> None:
    """Refuse groups that cannot be told which is which; in torch's words, with the numbers."""
    if len(saved) != len(own):
        raise ValueError(
            "load_state_dict: loaded state dict has a different number of parameter groups: "
            f"{len(saved)} were saved, this optimizer has {len(own)}"
        )
    for index, (there, here) in enumerate(zip(saved, own, strict=True) if strict else ()):
        if there != here:
            raise ValueError(
                "load_state_dict: loaded state dict contains a parameter group that doesn't match the "
                f"size of optimizer's group: of group {index} {there} parameters were saved, here it "
                f"has {here}. {HINT}"
            )


def _refuse(opt: "ChainOpt", loading: Mapping[str, Any], matches: list[Match]) -> None:
    missing = by_transform(key for match in matches for key in match.missing)
    extra = by_transform(key for match in matches for key in match.extra)
    keys = f"missing state: {missing}; state that has no place: {extra}"
    described, own = loading.get(DESCRIPTION), structure(opt.chain)
    if isinstance(described, dict) and described.get("chain") != own:
        raise ValueError(
            "load_state_dict: the state was saved by another chain\n"
            f"  saved:     {described.get('chain')}\n  this one:  {own}\n  {keys}\n  {HINT}"
        )
    for match in matches:
        if match.missing or match.extra:
            raise ValueError(
                f"load_state_dict: the state saved for {match.label} is not that of the chain {own}: "
                f"{keys}. {HINT}"
            )
        for fault in match.wrong:
            raise ValueError(f"load_state_dict: of the state saved for {match.label}, {fault}")


# ---- which parameter is which


def _by_name(
    opt: "ChainOpt", loading: Mapping[str, Any], counts: list[list[int]]
) -> dict[str, Any] | None:
    """The saved parameters' numbers by name; None where they are matched by their places."""
    saved: dict[str, Any] = {}
    for group in loading["param_groups"]:
        names = group.get("param_names") or [n for n in group["params"] if isinstance(n, str)]
        saved.update(zip(names, group["params"], strict=False))
    own = [name for group in opt.param_groups for name in group.get("param_names") or ()]
    total = sum(counts[1])
    if len(own) == total and len(saved) == sum(counts[0]) and saved.keys() & set(own):
        return saved
    if counts[0] != counts[1]:
        raise ValueError(
            f"load_state_dict: the groups saved have {counts[0]} parameters, those here {counts[1]}; "
            "which is which can only be told by names, given as model.named_parameters()"
        )
    return None


def _matches(
    opt: "ChainOpt", loading: Mapping[str, Any], by_name: Mapping[str, Any] | None
) -> Iterator[Match]:
    programs, state, number = opt._all_programs(), loading["state"], 0
    groups = zip(opt.param_groups, loading["param_groups"], strict=True)
    for index, (group, saved_group) in enumerate(groups):
        values = {**opt.defaults, **saved_group}
        for position, (name, param) in enumerate(labelled(index, group)):
            known = by_name is None or name in by_name
            place = saved_group["params"][position] if by_name is None else by_name.get(name or "")
            label, short = describe(name, index, position, param), name or str(number)
            found = state.get(place) or {}
            yield Match(label, short, param, programs[param], values, known, found)
            number += 1


# ---- what matches


def _partial(
    opt: "ChainOpt", loading: Mapping[str, Any], matches: list[Match]
) -> tuple[dict[str, Any], LoadResult]:
    left = LoadResult([], [])
    groups = [
        _entries(opt, index, saved, left) for index, saved in enumerate(loading["param_groups"])
    ]
    state: dict[int, dict[str, Tensor]] = {}
    for number, match in enumerate(matches):
        kept = _state(opt, match, left)
        if kept:
            state[number] = kept
    numbers = iter(range(len(matches)))
    for own, group in zip(opt.param_groups, groups, strict=True):
        group["params"] = [next(numbers) for _ in own["params"]]
    return {"state": state, "param_groups": groups}, left


def _state(opt: "ChainOpt", match: Match, left: LoadResult) -> dict[str, Tensor]:
    """The state of one parameter: what was saved, and what it has where nothing was."""
    own, taken = dict(opt.state.get(match.param, {})), match.usable()
    missing = match.missing if taken else match.expected if match.saved or not match.known else own
    left.missing_keys.extend(f"{match.short}.{key}" for key in missing)
    left.unexpected_keys.extend(f"{match.short}.{key}" for key in match.saved if key not in taken)
    if not taken:
        return own
    kept = {**{key: own[key] for key in missing if key in own}, **taken}
    add_missing_state(match.program, match.param.detach(), match.group, kept)
    return kept


def _entries(
    opt: "ChainOpt", index: int, saved: Mapping[str, Any], left: LoadResult
) -> dict[str, Any]:
    """A group's hyper-parameters: those saved that it knows and can take, else its own."""
    group = {k: v for k, v in opt.param_groups[index].items() if k != "params"}
    if "train_mode" in group:
        group["train_mode"] = True  # where nothing else was saved
    for key, value in saved.items():
        if key in ("params", "param_names"):
            continue
        known = key in group or key in opt.defaults or key in BOOKKEEPING or key.startswith("_")
        if known and _accepts(opt, key, value):
            group[key] = value
        else:
            left.unexpected_keys.append(f"param_groups.{index}.{key}")
    lacking = [k for k in opt.defaults if k not in saved and k != "differentiable"]
    left.missing_keys.extend(f"param_groups.{index}.{k}" for k in lacking)
    return group


def _accepts(opt: "ChainOpt", key: str, value: Any) -> bool:
    if key not in (*opt.chain.hyper, "lr", "seed", "warmup_steps"):
        return True
    try:
        opt._checked(key, value)
    except (TypeError, ValueError):
        return False
    return True
