"""Inputs of a step other than gradients: the loss, and signals of the model."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from heavyball.core.chain import Chain
from heavyball.core.hyper import is_real
from heavyball.errors import nearest
from heavyball.numerics import SCALAR
from heavyball.optim.registry import Registry
from heavyball.runtime.job import LOSS_KEY, fed_key


class Inputs:
    """Stores the loss and fed signals in the groups, where kernels read them."""

    def __init__(self, chain: Chain, owner: str):
        self._owner = owner
        self._reads_loss, self._signals = chain.reads_loss, chain.signals
        self._fed: dict[str, Tensor] = {}
        # whether a step needs any
        self.needed = self._reads_loss or bool(self._signals)

    def feed(self, name: str, value: Any) -> None:
        """Keep a signal for the next step.

        Errors: TypeError or ValueError naming the signal and what was expected.
        """
        said = f"{self._owner}.feed({name!r})"
        if name not in self._signals:
            raise ValueError(
                f"{said}: nothing in the chain reads it; {nearest(name, self._signals)}"
            )
        if not isinstance(value, Tensor) and not is_real(value):
            raise TypeError(f"{said}: {value!r}, expected a number or a tensor")
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=SCALAR, device="cpu")
        tensor = value.detach()
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError(f"{said}: a tensor of {tensor.dtype}, expected real numbers")
        self._fed[name] = tensor.to(SCALAR, copy=True)

    @contextlib.contextmanager
    def given(self, registry: Registry, loss: Any, returned: Any) -> Iterator[None]:
        """Hand the loss and the signals to a step.

        returned: what its closure has returned, which is the loss where none is given.

        Errors: TypeError or ValueError naming what is missing or cannot be.
        """
        groups, number = registry.groups, None
        if self._reads_loss or loss is not None:
            number = self._checked(returned if loss is None else loss)
        missing = sorted(n for n, must in self._signals.items() if must and n not in self._fed)
        if missing:
            raise ValueError(
                f"{self._owner}.step(): the chain reads {missing[0]!r}: call feed({missing[0]!r}, ...) "
                "before every step"
            )
        self.put(registry)
        try:
            for group in groups if self._reads_loss else ():
                group[LOSS_KEY] = number
            yield
        finally:
            for group in groups:
                group.pop(LOSS_KEY, None)
                for name in self._fed:
                    group.pop(fed_key(name), None)
        self._fed = {}

    @contextlib.contextmanager
    def imagined(self, groups: list[dict[str, Any]]) -> Iterator[None]:
        """Provide placeholder inputs, for plans of a step."""
        names = [LOSS_KEY] if self._reads_loss else []
        names += [fed_key(name) for name, must in self._signals.items() if must]
        put = [(group, name) for group in groups for name in names if name not in group]
        for group, name in put:
            group[name] = torch.zeros((), dtype=SCALAR, device="cpu")
        try:
            yield
        finally:
            for group, name in put:
                del group[name]

    def told(self) -> dict[str, Tensor]:
        """What was fed and waits for a step."""
        return dict(self._fed)

    def put(self, registry: Registry) -> None:
        """Put what was fed into the groups, for steps inside `backward()` too.

        Errors: ValueError naming a signal that no parameter's chain reads, or of another size than an
            element expects.
        """
        if self._fed:
            self._check_fed(registry)
        for group in registry.groups:
            group.update((fed_key(name), value) for name, value in self._fed.items())

    def _check_fed(self, registry: Registry) -> None:
        programs, unread = registry.programs(), {*self._fed}
        for place in registry.places():
            for t in (node.transform for node in programs[place.param].flat):
                if t.signal not in self._fed:
                    continue
                unread.discard(t.signal)
                shape, count = place.param.shape, self._fed[t.signal].numel()
                expected = t.refused_fed(shape, count)
                if expected:
                    raise ValueError(
                        f"{self._owner}.feed({t.signal!r}): {count} numbers; {t!r} of {place.label} "
                        f"expects {expected}"
                    )
        if unread:
            raise ValueError(
                f"{self._owner}.feed({min(unread)!r}): no parameter has an element that reads it; "
                "print(opt.routing()) shows the chain of each (parameters need names)"
            )

    def _checked(self, loss: Any) -> float | Tensor:
        if not self._reads_loss:
            raise ValueError(
                f"{self._owner}.step(loss={loss!r}): nothing in the chain reads a loss"
            )
        if loss is None:
            raise ValueError(
                f"{self._owner}.step(): the chain reads the loss: pass step(loss=loss), or a closure "
                "that returns it"
            )
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
            return loss.detach().to(SCALAR).reshape(())
        if not is_real(loss):
            raise TypeError(
                f"{self._owner}.step(loss={loss!r}): expected a number, or a tensor of one element"
            )
        return float(loss)
