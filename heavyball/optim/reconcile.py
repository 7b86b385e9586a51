"""Notices what was done by hand to groups and parameters, and refuses what cannot be right."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.core.program import Program
from heavyball.optim.checkpoint import by_transform, convert, expected_state, misfits
from heavyball.optim.checks import labelled
from heavyball.optim.estimate import warn_of_half
from heavyball.runtime.place import describe

if TYPE_CHECKING:
    from heavyball.optim.optimizer import ChainOpt

# What a parameter's program and state were made for.
Kind = tuple[torch.Size, torch.dtype]


def kind(param: Tensor) -> Kind:
    return param.shape, param.dtype


def notice(opt: "ChainOpt", programs: dict[Tensor, Program], kinds: dict[Tensor, Kind]) -> None:
    """Bring programs and kinds up to what the groups hold now.

    A parameter of another dtype gets its state in the dtype that goes with it. Removed parameters
    keep their state, in case they come back.

    Errors: ValueError naming a parameter that took the place of one with state, or whose state does
        not fit it. Nothing has been changed then.
    """
    places: dict[Tensor, tuple[int, int, str | None]] = {}
    for index, group in enumerate(opt.param_groups):
        for position, (name, param) in enumerate(labelled(index, group)):
            places.setdefault(param, (index, position, name))
    changed = [p for p in places if kinds.get(p) != kind(p)]
    gone = [p for p in programs if p not in places]
    labels = {p: describe(places[p][2], *places[p][:2], p) for p in changed}
    _refuse_replaced(opt, [p for p in changed if p not in programs], gone, labels)
    found, expected = {}, {}
    for param in changed:
        index, _, name = places[param]
        program = found[param] = opt._program_of(labels[param], name, param)
        if "step" in opt.state.get(param, ()):
            group = opt.param_groups[index]
            expected[param] = _checked(labels[param], program, param, group, opt.state[param])
    for param, tensors in expected.items():
        convert(opt.state[param], tensors, found[param])
    unlike = labels if programs else {}  # a copy has noticed nothing yet, and they are as they were
    for param in gone:
        del programs[param], kinds[param]
    programs.update(found)
    kinds.update((p, kind(p)) for p in changed)
    warn_of_half(opt._chain, unlike)


def _refuse_replaced(
    opt: "ChainOpt", new: list[Tensor], gone: list[Tensor], labels: Mapping[Tensor, str]
) -> None:
    """Refuse parameters without state where ones with state have gone: their training would be lost."""
    bare = [p for p in new if "step" not in opt.state.get(p, ())]
    lost = [p for p in gone if "step" in opt.state.get(p, ())]
    if bare and lost:
        shapes = ", ".join(str(tuple(p.shape)) for p in lost[:3])
        raise ValueError(
            f"{labels[bare[0]]} was put into its group by hand, in place of one that has state (of "
            f"shape {shapes}): give it that state, opt.state[new] = opt.state.pop(old), or let it begin "
            "anew, del opt.state[old]"
        )


def _checked(
    label: str,
    program: Program,
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    expected = expected_state(program, param, group)
    own = {key: value for key, value in state.items() if program.owns((key,))}
    missing, extra, wrong = misfits(own, expected, program, param)
    if missing or extra:
        wrong.append(f"missing: {by_transform(missing)}; has no place: {by_transform(extra)}")
    if wrong:
        raise ValueError(
            f"{label} was resized or replaced, and its state does not fit: {'; '.join(wrong)}. Give it "
            "state of that shape, or let it begin anew, del opt.state[parameter]"
        )
    return expected
