"""What a constructor is given: parameters in any form, elements as text, names of a wrapped model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from heavyball.core.combine import REPLICA, GivenName, plain_names, private_name
from heavyball.core.text import read_elements


class GroupsOf(list):
    """Parameter groups made from a model, which provides the types of its modules."""

    def __init__(self, groups: Sequence[Any], model: nn.Module):
        super().__init__(groups)
        self.model = model


def as_params(params: Any) -> Any:
    """What torch's constructor takes: a module gives its named parameters."""
    return list(params.named_parameters()) if isinstance(params, nn.Module) else params


def model_of(params: Any) -> nn.Module | None:
    """The model that parameters were given as, if it was one."""
    return params if isinstance(params, nn.Module) else getattr(params, "model", None)


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms
)


def kinds_of(model: nn.Module) -> dict[str, str]:
    """The kinds of a model's embedding and norm parameters, by plain name.

    One that several modules share is an embedding if one of them is. Modules of other libraries are
    known by their names: `LlamaRMSNorm`, `T5LayerNorm`, `ScaledWordEmbedding`.
    """
    named = list(model.named_parameters())
    plain = dict(zip((name for name, _ in named), plain_names([n for n, _ in named]), strict=True))
    names = {id(param): plain[name] for name, param in named}
    found: dict[str, str] = {}
    for module in model.modules():
        kind = type(module).__name__
        is_embedding = isinstance(module, EMBEDDINGS) or kind.lower().endswith("embedding")
        if is_embedding or isinstance(module, NORMS) or kind.lower().endswith("norm"):
            for param in module.parameters(recurse=False):
                found.setdefault(names[id(param)], kind)
    return {name: found[name] for name in plain.values() if name in found}


def given_elements(places: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """The elements of a chain, given in their places or as `transforms=`, which leaves the options.

    Errors: TypeError if they are given in both ways; ChainError (a ValueError) for what is no chain.
    """
    if "transforms" not in options:
        return read_elements(places)
    if places:
        raise TypeError("transforms were given twice: as arguments, and as transforms=")
    return read_elements(options.pop("transforms"))


def routed_name(name: str | None, groups: Sequence[Mapping[str, Any]]) -> GivenName | None:
    """A parameter's name with that in the model itself: a replica puts `module.` before all of them."""
    if name is None:
        return None
    plain = private_name(name)
    if plain.startswith(REPLICA) and all(
        private_name(other).startswith(REPLICA)
        for group in groups
        for other in group.get("param_names") or ()
    ):
        plain = plain[len(REPLICA) :]
    return GivenName(name, plain)
