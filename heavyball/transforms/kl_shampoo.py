"""KL-Shampoo: momentum over the root of Kronecker factors that are fitted in the KL sense."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from heavyball.core.hyper import Fixed, Live, closed_fraction, positive
from heavyball.core.whole import whole_transform
from heavyball.linalg.basis import Pieces, by_block, refresh_pieces, working_of
from heavyball.linalg.kl import over_roots
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.modes import rotate
from heavyball.linalg.view import WorkingShape
from heavyball.numerics import lerp
from heavyball.state.declare import State, zeros
from heavyball.transforms.soap import BASIS, GRAM, VALUES, first_bases, kl_step, turned_pieces


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    plain = {"merge_dims": False, "split": False, "precondition_1d": False, "sides": "all"}
    return {**plain, **options}


def _of(state: State) -> State:
    return State(lambda p, options: state.init(p, _options(options)), state.rule, several=True)


def _problem(shape: torch.Size, options: Mapping[str, Any]) -> str | None:
    try:
        working_of(tuple(shape), _options(options))
    except ValueError as error:
        return str(error)
    return None


def _due(count: int, *, precondition_frequency: int) -> bool:
    return count > 1 and (count - 1) % precondition_frequency == 0


def _refresh(
    exp_avg: Tensor,
    gram: Pieces,
    basis: Pieces,
    eigenvalues: Pieces,
    *,
    vectors: tuple[Tensor, ...],
    squares: tuple[Tensor, ...],
) -> tuple[Any, ...]:
    def everyone(piece: int) -> range:
        return range(len(exp_avg))

    new, _ = refresh_pieces(gram, turned_pieces(basis), "qr", everyone, sort=False)
    return exp_avg, gram, turned_pieces(new), eigenvalues, vectors, squares


@whole_transform(
    exp_avg=zeros,
    gram=_of(GRAM),
    basis=_of(BASIS),
    eigenvalues=_of(VALUES),
    provides=("gate", "step"),
    opens_once=True,
    host=("shampoo_beta",),
    domains={
        "shampoo_beta": closed_fraction,
        "precondition_frequency": positive,
        "max_precond_dim": positive,
        "eigenvalue_init": positive,
    },
    requires=_problem,
    after=_refresh,
    due=_due,
)
def kl_shampoo(
    update: Tensor,
    exp_avg: Tensor,
    gram: Pieces,
    basis: Pieces,
    eigenvalues: Pieces,
    *,
    count: int,
    betas: Live = (0.9, 0.98),
    shampoo_beta: Live | None = None,
    eps: Live = 1e-8,
    precondition_frequency: int = 10,
    eigenvalue_init: Fixed = 0.1,
    max_precond_dim: int = 10000,
    blocks: Blocks = None,
    axis: Literal[0, 1] = 0,
) -> tuple[Any, ...]:
    """Divide the momentum by the root of a Kronecker product that fits the gradients' covariance.

    t = 1: bases as in `to_eigenbasis`, and no step
    t > 1: m <- betas[0] m + (1 - betas[0]) g;  u = m, rotated, over sqrt(l_i r_j) + eps, rotated back
    then the factors and eigenvalues l, r of `to_eigenbasis` with gram="kl", and after the write, every
    `precondition_frequency` steps, Q <- orthogonal factor of GG Q

    shampoo_beta: None is betas[1]. blocks, axis: as in `orthogonalize`.

    Shapes: all (*); axes of one element or of more than `max_precond_dim` are skipped.
    Units: the result is dimensionless. lr about 1e-4.
    Source: https://arxiv.org/abs/2509.03378 and the authors' kl_opt.py.
    """
    options = {"max_precond_dim": max_precond_dim, "blocks": blocks, "axis": axis}
    working = working_of(tuple(update.shape[1:]), _options(options))
    beta = float(betas[1]) if shampoo_beta is None else float(shampoo_beta)
    if count == 1:
        gram, basis = first_bases(working, update, gram, beta)
        return update, exp_avg.clone(), gram, basis, eigenvalues, False, 0
    bases = turned_pieces(basis)
    exp_avg = lerp(exp_avg, update, 1 - betas[0])
    result = _preconditioned(working, exp_avg, bases, eigenvalues, eps)
    turned = working.whole_of(
        [
            rotate(x, q)
            for x, q in zip(working.blocks_of(update), by_block(working, bases), strict=True)
        ]
    )
    gram, values = kl_step(working, turned, gram, bases, eigenvalues, beta)
    return result, exp_avg, gram, basis, values, True, count - 1


def _preconditioned(
    working: WorkingShape, x: Tensor, bases: Pieces, values: Pieces, eps: Tensor
) -> Tensor:
    pieces = zip(by_block(working, bases), by_block(working, values), strict=True)
    return working.whole_of(
        [
            rotate(over_roots(rotate(block, q), v, eps), q, back=True)
            for block, (q, v) in zip(working.blocks_of(x), pieces, strict=True)
        ]
    )
