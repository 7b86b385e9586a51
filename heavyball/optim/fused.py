"""Fused backward: step each parameter as soon as its gradient is complete, and free the gradient."""

import functools
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from heavyball.distributed import is_sharded
from heavyball.optim import outer_clip
from heavyball.optim.registry import Registry
from heavyball.optim.singles import Singles
from heavyball.runtime.place import Place
from heavyball.runtime.tracing import opaque


def fuse_backward(opt: Any) -> "FusedBackward":
    """Step each parameter inside `backward()` once its gradient is complete, and free the gradient.

    The gradients never exist all at once. The results are bit-identical to those of the ordinary
    step with `foreach=False`, and also without it unless matrix methods batch small parameters of
    the same shape, because batched products round differently.

    Call `opt.step()` after every `backward()`: it ends the step, and steps parameters that still have a
    gradient (one assigned by hand). Calling this function again changes nothing; `remove()` undoes it. A
    copied or unpickled optimizer is fused like the original, over its own parameters.

    Errors: ValueError if a chain in use needs a sum over all parameters, naming the element, or a
        parameter is in the optimizer twice. In `backward()`: RuntimeError for a second gradient of a
        parameter before `step()`, in evaluation mode, and where two optimizers would step a parameter;
        else what `step()` raises. In `step()`: RuntimeError when a GradScaler calls it.
    """
    if not isinstance(getattr(opt, "registry", None), Registry):
        raise TypeError(
            f"fuse_backward: expected an optimizer of heavyball, got {type(opt).__name__}"
        )
    return opt.fuse_backward()


# Which fused optimizers each parameter belongs to, and how often that has changed.
_owners = WeakTensorKeyDictionary()
_changes = 0


class FusedBackward:
    """The hooks that step an optimizer's parameters inside `backward()`.

    singles: gives what steps the parameters, None if the optimizer is gone: parameters outlive
        optimizers, and hold their hooks.
    ends_step: whether a second gradient of a parameter begins a new step.
    """

    def __init__(self, singles: Callable[[], Singles | None], ends_step: bool):
        self.active = False
        self._singles = singles
        self._ends_step = ends_step
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._stepped: set[Tensor] = set()
        self._told = False  # of a clip that has no effect

    def remove(self) -> None:
        """Remove the hooks: `backward()` then leaves gradients, and `step()` uses them."""
        for param, handle in self._handles.items():
            handle.remove()
            _owners[param].discard(self)
        self._handles = {}
        self.active = False
        self.begin()

    def attach(self) -> None:
        """Hook on to every parameter that can have a gradient and has no hook yet."""
        global _changes
        singles = self._singles()
        assert singles is not None
        places = list(singles.registry.places())
        for place in places:
            single = singles.find(place.param)
            if single is not None and single.refusal is not None:
                raise ValueError(f"fuse_backward: {single.refusal}")
        refuse_processes(places)
        self.active = True
        outer_clip.watch(_on_clip)
        for place in places:
            param = place.param
            if param.requires_grad and param not in self._handles:
                owners = _owners.setdefault(param, weakref.WeakSet())
                owners.add(self)
                hook = functools.partial(_on_gradient, weakref.ref(self), owners)
                self._handles[param] = param.register_post_accumulate_grad_hook(hook)
                _changes += 1

    def on_clip(self, what: str) -> None:
        """Something clips gradients that were used and freed: say so, once."""
        singles = self._singles()
        if self.active and not self._told and singles is not None:
            self._told = True
            outer_clip.warn_of_clip(singles.registry.type.__name__, what)

    def begin(self) -> None:
        """Begin a step: no parameter has been stepped in it."""
        self._stepped.clear()

    @property
    def stepped(self) -> set[Tensor]:
        """The parameters that have been stepped in this step."""
        return set(self._stepped)

    @property
    def has_begun(self) -> bool:
        """Whether a parameter has been stepped in this step."""
        return bool(self._stepped)

    def on_gradient(self, param: Tensor, owners: weakref.WeakSet) -> None:
        """A parameter's gradient is complete: step it."""
        singles = self._singles()
        single = None if singles is None else singles.find(param)
        if singles is None or single is None:  # a parameter that has left the optimizer
            self._handles.pop(param).remove()
            owners.discard(self)
            return
        if len(owners) > 1:
            raise RuntimeError(
                f"{single.place.label} is in {len(owners)} optimizers that step inside backward(), "
                "but only one of them can: remove() the other's hooks"
            )
        again = param in self._stepped
        if again and not self._ends_step:
            raise RuntimeError(
                f"{single.place.label} has a second gradient before step(), but was stepped with the "
                "first: with fuse_backward, call step() after every backward(); to accumulate "
                "gradients, put `accumulate` into the chain"
            )
        singles.step(single, "backward()")
        if again:
            self.begin()
        self._stepped.add(param)

    def check_left(self, registry: Registry) -> None:
        """Before the step ends: no parameter may be stepped a second time."""
        if any(param.grad is not None for param in self._stepped):
            for place in registry.places():
                if place.param in self._stepped and place.param.grad is not None:
                    raise RuntimeError(
                        f"{place.label} was stepped in backward() and has a gradient again: with "
                        "fuse_backward, call step() after every backward(), or zero_grad() to drop it"
                    )

    def finish(self, groups: list[dict[str, Any]]) -> None:
        """End the step: free the gradients that it found, and hook on to what came in the meantime."""
        params = [p for group in groups for p in group["params"]]
        for param in params:
            if param.grad is not None:
                param.grad = None
        if any(p.requires_grad and p not in self._handles for p in params):
            self.attach()
        self.begin()


def _on_clip(param: Tensor, what: str) -> bool:
    owners = list(_owners.get(param, ()))
    for fused in owners if what else ():
        fused.on_clip(what)
    return bool(owners)


@opaque
def _on_gradient(
    fused: "weakref.ref[FusedBackward]", owners: weakref.WeakSet, param: Tensor
) -> None:
    found = fused()
    if found is None:
        return
    if torch.is_grad_enabled():  # backward(create_graph=True)
        with torch.no_grad():
            found.on_gradient(param, owners)
    else:
        found.on_gradient(param, owners)


# ---- refusals


def refuse_processes(places: list[Place]) -> None:
    """Refuse replicas: their gradients are averaged only after they are complete here.

    Those of DTensors are reduced when they are complete.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    plain = [place for place in places if not is_sharded(place.param)]
    if plain and distributed.get_world_size() > 1:
        raise ValueError(
            f"fuse_backward: {plain[0].label} in {distributed.get_world_size()} processes would be "
            "stepped before its gradient is averaged over them; step without fuse_backward"
        )


def refuse_scaler(attributes: MutableMapping[str, Any]) -> None:
    """Refuse a GradScaler, which leaves what it wants done with the scale as attributes."""
    if "found_inf" in attributes:
        for name in ("found_inf", "grad_scale"):
            attributes.pop(name, None)
        raise RuntimeError(
            "GradScaler with fuse_backward: the parameters were already stepped in backward(), with "
            "scaled gradients. Restart from a checkpoint with bfloat16 or float32 and without a scaler, "
            "or without fuse_backward"
        )


class Rivals:
    """Other optimizers that would free a parameter's gradient before this one sees it."""

    def __init__(self) -> None:
        self._checked: int | None = None

    def forget(self) -> None:
        """Look again at the next step: there are new parameters."""
        self._checked = None

    def refuse(self, registry: Registry, own: FusedBackward | None) -> None:
        """Refuse parameters that other optimizers step inside `backward()`.

        Errors: RuntimeError naming the first of them.
        """
        if self._checked == _changes:
            return
        for place in registry.places():
            others = [other for other in _owners.get(place.param, ()) if other is not own]
            if others:
                raise RuntimeError(
                    f"{place.label} is stepped by another optimizer inside backward(), which frees its "
                    "gradient: remove() the other's hooks, or leave the parameter to one of the two"
                )
        self._checked = _changes
