"""QK-clip: rows of queries and keys shrink where an attention logit was too large."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.core.hyper import Live, closed_fraction, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.matrices import Blocks, matrices

MOVED = "the weights that it clips are not those from which the next step is taken"


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    if not shape:
        return "needs rows, one or more for each head"
    _heads(shape, options)
    return None


def _heads(shape: torch.Size, options: Mapping[str, Any]) -> int:
    return len(matrices(tuple(shape), blocks=options["heads"]).cut.sizes)


@whole_transform(
    kind="post",
    requires=_problem,
    domains={"tau": positive, "exponent": closed_fraction},
    excludes=dict.fromkeys(
        ("schedule_free", "primal_average", "momentum_sam", "ema_nesterov", "lookahead"), MOVED
    ),
    fed_numbers=_heads,
)
def qk_clip(
    update: Tensor,
    *,
    fed: Tensor | None = None,
    heads: Blocks = 1,
    tau: Live = 100.0,
    exponent: Live = 0.5,
    signal: str | Mapping[str, str] = "max_logits",
) -> Tensor:
    """Shrink the query or key rows of every head whose largest attention logit exceeded tau.

    after the write, rows of head h <- (tau / max(S_h, tau))^exponent times themselves

    `feed(signal, S)` gives S_h before a step: the largest logit of head h over the whole batch, all
    micro-batches and processes. With more numbers than heads, as for the keys of grouped queries, each
    head uses the largest of its group of neighbouring numbers. Steps without a signal, and an S_h
    that is not finite, change nothing. Each layer has its own signal: {"*layers.0.*": "layers.0"}.

    heads: their number, or how axis 0 is split, as `blocks` of `orthogonalize`.
    exponent: use 1 - exponent for the other of the two; 1 for rotary queries of MLA, whose shared keys
        are not changed.

    Shapes: one or more dimensions.
    Units: tau is a logit.
    Errors: ValueError for heads that do not divide axis 0, and for a signal of another size.
    Source: Kimi K2, Algorithm 1, https://arxiv.org/abs/2507.20534. The momentum is not changed.
    """
    if fed is None:
        return update
    view = matrices(update.shape[1:], blocks=heads)
    largest = fed.reshape(len(view.cut.sizes), -1).amax(-1)
    clipped = torch.isfinite(largest) & (largest > tau)
    factor = torch.where(clipped, (tau / largest) ** exponent, 1.0).to(update.dtype)
    each = factor.reshape(-1, 1).expand(len(update), -1, 1)
    return view.map(lambda rows, scale: rows * scale, update, more=(each,))
