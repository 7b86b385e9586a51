"""What a run does where its program needs the whole tensor: it asks, waits, and takes the answer.

A run yields a `Call` and is sent an `Answer`. Who answers is the eager runner, tensor by tensor or for
several at once, or the compiler, which records the question and asks it at every step.
"""

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heavyball.chain import Node
from heavyball.numerics import SCALAR
from heavyball.states import new_states
from heavyball.transform import WHOLE_CONTEXT
from heavyball.whole import Answer, Call, due

if TYPE_CHECKING:
    from heavyball.runner import Frame


def call(node: Node, update: Tensor, frame: "Frame") -> Generator[Any, Any, Tensor]:
    """A whole transform's turn: what it may ask for, and what it has changed."""
    t, env = node.transform, frame.env
    known = {n: frame.context(n) for n in t.context if n not in WHOLE_CONTEXT}
    known |= {n: env.get(n) for n in t.optional}
    known["step"] = env["step"]
    asked = Call(node, frame.job, update, env["count"], known, gate=env["gate"], new=frame.new)
    answer: Answer | None = yield asked
    if answer is None:  # the gate is closed
        frame.ended = True
        return update
    # that the gate is open is a decision on the host
    env["gate"], env["count"] = None, answer.count
    frame.new.update(new_states(node, frame.job, answer.states))
    if t.after is not None:
        frame.hooks.append(Call(node, frame.job, None, answer.count, known, after=True))
    for name, value in answer.provided.items():
        _provide(node, name, value, frame)
    return answer.update


def _provide(node: Node, name: str, value: Any, frame: "Frame") -> None:
    if name == "gate":
        frame.ended |= value is False
        value = None if isinstance(value, bool) else value
    elif name == "step":
        frame.env["count"] = value if isinstance(value, int) else None
    if isinstance(value, int | float) and name not in node.transform.opaque:
        value = torch.full((), value, dtype=SCALAR, device=frame.job.param.device)
    frame.env[name] = value


def run_hooks(frame: "Frame") -> Generator[Any, Any, None]:
    """Run what nodes do after the write, on the new states."""
    for hook in frame.hooks:
        if hook.count is not None and due(hook.node, hook.count):
            moments, squares = rotating(hook.node, frame.new)
            hook.new = frame.new
            hook.vectors = [frame.new[key] for key in moments]
            hook.squares = [frame.new[key] for key in squares]
            answer: Answer = yield hook
            frame.new.update(new_states(hook.node, frame.job, answer.states))
            frame.new.update(zip(moments, answer.vectors, strict=True))
            frame.new.update(zip(squares, answer.squares, strict=True))


def rotating(node: Node, present: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The keys of the moments and of the squares that turn with a node's basis."""
    moments: list[str] = []
    squares: list[str] = []
    for inner in node.inner:
        for name, declared in inner.transform.states.items():
            key = inner.state_key(name)
            if key in present and declared.holds in ("moment", "square"):
                (moments if declared.holds == "moment" else squares).append(key)
    return moments, squares
