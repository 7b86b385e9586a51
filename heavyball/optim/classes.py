"""Optimizer classes for chains, for APIs that expect a class: trainers, registries, configurations."""

import copyreg
import weakref
from typing import Any

from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import is_sequence
from heavyball.core.text import read_elements
from heavyball.optim.optimizer import ChainOpt


class ChainClass(type):
    """The metaclass of `optimizer_class`; its classes pickle as their chain."""

    made_from: tuple[Any, str]


def optimizer_class(what: Any, name: str = "ChainOptimizer") -> type[ChainOpt]:
    """A subclass of `ChainOpt` for one chain, with the constructor `(params, lr, **options)`.

    The class and its instances can be pickled and copied, also to processes that did not create it.

    what: text such as "scale_by_adam | cautious", an element, or a sequence of both.
    name: what the class is called.
    options: those of `ChainOpt`.

    Errors: those of `ChainOpt` for an invalid chain; TypeError for an invalid class name.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"optimizer_class: name={name!r}, expected a name such as 'CautiousAdam'")
    if is_sequence(what):
        what = tuple(
            what
        )  # a configuration's list would need its library where the class is unpickled
    known = _made.get((what, name)) if isinstance(what, str) else None
    if known is not None:
        return known
    elements = read_elements(what)
    chain = Chain(elements, name)

    def __init__(self: ChainOpt, params: Any, lr: float | Tensor, **options: Any) -> None:  # noqa: N807
        ChainOpt.__init__(self, params, lr, *elements, **options)

    body = {
        "__init__": __init__,
        "__doc__": f"The chain {chain!r}; options as of `ChainOpt`.",
        "made_from": (what, name),
    }
    cls: Any = ChainClass(name, (ChainOpt,), body)
    if isinstance(what, str):
        _made[what, name] = cls
    return cls


# One class for one text and name, so that what was pickled comes back as it was.
_made: weakref.WeakValueDictionary[tuple[str, str], Any] = weakref.WeakValueDictionary()


def _reduced(cls: Any) -> Any:
    return optimizer_class, cls.made_from


copyreg.pickle(ChainClass, _reduced)
