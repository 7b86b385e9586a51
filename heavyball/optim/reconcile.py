"""Refuses changes to parameters that would lose or misread state."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from heavyball.core.program import Program
from heavyball.optim.checkpoint import by_transform, expected_state, misfits, value_shapes


def refuse_replaced(
    new: list[Tensor],
    gone: list[Tensor],
    labels: Mapping[Tensor, str],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Refuse parameters without state that replace ones with state, which would lose their training.

    labels: what errors call the new ones.

    Errors: ValueError naming the first of them.
    """
    bare = [p for p in new if "step" not in state.get(p, ())]
    lost = [p for p in gone if "step" in state.get(p, ())]
    if bare and lost:
        shapes = ", ".join(str(tuple(p.shape)) for p in lost[:3])
        raise ValueError(
            f"{labels[bare[0]]} replaced a parameter in its group that has state (of shape {shapes}): "
            "move the state, opt.state[new] = opt.state.pop(old), or discard it, del opt.state[old]"
        )


def fitting_state(
    label: str,
    program: Program,
    param: Tensor,
    group: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The state that a parameter which was resized or replaced should have.

    Errors: ValueError if what it has cannot be brought to that.
    """
    expected = expected_state(program, param, group)
    own = {key: value for key, value in state.items() if program.owns((key,))}
    shapes = value_shapes(program, param, expected)
    missing, extra, wrong = misfits(own, expected, program, param, shapes)
    if missing or extra:
        wrong.append(f"missing: {by_transform(missing)}; has no place: {by_transform(extra)}")
    if wrong:
        raise ValueError(
            f"{label} was resized or replaced, and its state does not fit: {'; '.join(wrong)}. Assign "
            "state of that shape, or discard it, del opt.state[parameter]"
        )
    return expected
