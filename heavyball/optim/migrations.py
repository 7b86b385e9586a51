"""What brings state dicts of older versions up, one function for each version."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from heavyball.optim.checkpoint import migration
from heavyball.state.held import CORRECTION

BASIS = re.compile(r"^(to_eigenbasis(?:\.\d+)?)\.basis\.(\d+)$")
AVERAGE = re.compile(r"^(schedule_free(?:\.\d+)?)\.weight_sum$")
# How much nearer to diagonal the Gram matrices must be in one reading of the bases than in the other.
CLEARLY = 10.0


@migration(1)
def eigenvectors_as_rows(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Version 1 held SOAP's eigenvectors as columns at first and as rows later; and no `last_beta`.

    Errors: ValueError where it cannot be told which, for all of the bases together.
    """
    state_dict["state"] = {n: _migrated(s) for n, s in state_dict["state"].items()}
    pairs = list(_bases(state_dict["state"].values()))
    rows = sum(_off_diagonal(basis @ gram @ basis.mT) for basis, gram in pairs)
    columns = sum(_off_diagonal(basis.mT @ gram @ basis) for basis, gram in pairs)
    alike = all(torch.equal(basis, basis.mT) for basis, _ in pairs)
    if alike or (rows < columns and rows * CLEARLY <= columns):
        return state_dict
    if not (columns < rows and columns * CLEARLY <= rows):
        raise ValueError(
            "load_state_dict: 'to_eigenbasis.basis' was saved as version 1, which stored eigenvectors "
            "as columns at first and as rows later, and the Gram matrices do not determine which. If "
            "you know, convert columns to rows and set the description's version to 2; otherwise remove "
            "the state of the parameters that have it"
        )
    state_dict["state"] = {
        number: {key: _turned(key, value) for key, value in state.items()}
        for number, state in state_dict["state"].items()
    }
    return state_dict


def _migrated(state: Any) -> Any:
    if not isinstance(state, Mapping):
        return state
    new = [match[1] + ".last_beta" for key in state if (match := AVERAGE.match(str(key)))]
    # 0: as if it had not changed
    return {**{key: torch.zeros((), dtype=torch.float64, device="cpu") for key in new}, **state}


def _bases(states: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Every basis beside its Gram matrix, with trace 1."""
    for state in states:
        for key, basis in state.items() if isinstance(state, Mapping) else ():
            match = BASIS.match(str(key))
            gram = state.get(f"{match[1]}.gram.{match[2]}") if match else None
            if isinstance(gram, Tensor) and isinstance(basis, Tensor) and gram.shape == basis.shape:
                wide = gram.double()
                if wide.trace() != 0:
                    yield basis.double(), wide / wide.trace()


def _off_diagonal(matrix: Tensor) -> float:
    return float((matrix - matrix.diagonal().diag()).square().sum())


def _turned(key: Any, value: Any) -> Any:
    main = str(key).removesuffix(CORRECTION)
    return value.mT.contiguous() if BASIS.match(main) and isinstance(value, Tensor) else value
