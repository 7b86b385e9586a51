"""The gate of chains that read the loss: a step whose loss is no finite number changes nothing."""

import torch
from torch import Tensor

from heavyball.core.program import Fork, HiddenNode, Node
from heavyball.core.transform import Rules, Signature, Transform
from heavyball.state.declare import scalar

KEY = "loss_gate"
# The bound of float64 gradients: sums over steps of what is below it, and its square, are finite.
BOUND = 2.0**504


def finite_loss(
    update: Tensor, left_out: Tensor, /, *, step: Tensor, loss: Tensor
) -> tuple[Tensor, ...]:
    """Provide whether the loss is a number that can be averaged, and count the steps in which it was."""
    finite = torch.abs(loss) <= BOUND  # not of a NaN
    left_out = left_out + (~finite).to(left_out.dtype)
    return update, left_out, finite, (step - left_out).clamp(min=1)


def with_loss_gate(nodes: tuple[Node | Fork, ...]) -> tuple[Node | Fork, ...]:
    """Put the gate before all nodes."""
    made = Transform(
        KEY,
        finite_loss,
        Signature({}, {}, ("step", "loss"), ()),
        {"left_out": scalar(0.0, low=0.0)},
        {},
        {},
        ("gate", "step"),
        "transform",
        Rules({}, {}, "", False, None, False),
    )
    return (HiddenNode(made, KEY, {}), *nodes)
