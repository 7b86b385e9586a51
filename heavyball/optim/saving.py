"""How an optimizer is saved, loaded, pickled and copied."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from heavyball.core.chain import Chain
from heavyball.optim.checkpoint import LoadResult, describe, migrate
from heavyball.optim.evaluation import Evaluation, stamp
from heavyball.optim.flight import Recorder
from heavyball.optim.fused import FusedBackward
from heavyball.optim.inputs import Inputs
from heavyball.optim.loading import all_or_nothing, fit
from heavyball.optim.options import Options
from heavyball.optim.registry import Registry
from heavyball.optim.steps import Steps
from heavyball.optim.validation import check_form
from heavyball.runtime.tracing import hide_step


class Saving(Optimizer):
    """The part of `ChainOpt` that makes a state dict of it, and one of a state dict."""

    _chain: Chain
    _options: Options
    _registry: Registry
    _evaluation: Evaluation
    _fused: FusedBackward
    _steps: Steps
    _inputs: Inputs
    _recorder: Recorder

    @abstractmethod
    def _set_up(self) -> None:
        """Make everything that belongs to one optimizer and is not saved."""

    @abstractmethod
    def _begin(self, registry: Registry) -> None:
        """Know nothing of the steps so far."""

    @abstractmethod
    def _watch(self, evaluation: Evaluation) -> None:
        """Have every step tell this one which weights it has written."""

    def _rebuild(self) -> None:
        """Recreate everything that was made for the chain; state and group numbers stay."""
        self._steps.singles.pending.close(self.param_groups)
        written, measured = self._evaluation.written, self._steps.measured
        inputs, recorder, before = self._inputs, self._recorder, self._registry
        self._begin(Registry(self, self._chain, self._options.stochastic_rounding))
        self._inputs, self._recorder = inputs, recorder.on(self._registry)
        self._registry.take_unstepped(before)
        self._registry.find_parts(self._options)
        self._registry.settle()
        self._registry.programs()
        self._evaluation.written, self._steps.measured = written, measured

    def __getstate__(self) -> dict[str, Any]:
        own = ("_chain", "_options", "_built", "backward_ends_step")
        kept = {name: value for name, value in vars(self).items() if name in own}
        # hooks belong to the parameters of this optimizer; a copy registers its own
        kept |= {"_fuse_backward": self._fused.active, "_unstepped": self._registry.unstepped()}
        kept["_owners"] = self._registry.owners()
        return {**super().__getstate__(), **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        hide_step(type(self))
        loaded = self.__dict__.pop("_loading", None)
        if loaded is None:
            self._set_up()
        else:
            self._begin(self._registry.renewed(self))
        registry = self._registry
        registry.settle()
        registry.find_parts(self._options)
        registry.keep_owners(self.__dict__.pop("_owners", ()))
        if loaded is None:
            registry.note_unstepped(self.__dict__.pop("_unstepped"))
            if self.__dict__.pop("_fuse_backward"):
                self._fused.attach()
            return
        registry.put_state(loaded)
        if not registry.training:
            stamps = {p: stamp(p) for group in self.param_groups for p in group["params"]}
            self._watch(Evaluation(registry, stamps))
        self._fused.begin()

    def state_dict(self) -> dict[str, Any]:
        """The state of all parameters in the groups, the groups, and a description of the chain.

        Tensors and plain values only, so `torch.load(weights_only=True)` reads it. The tensors are the
        optimizer's own.
        """
        if "train_mode" in self.defaults:
            with torch.no_grad():
                self._evaluation.notice()
        held = {param for group in self.param_groups for param in group["params"]}
        state = self.state
        # First of all hooks, so that the user's see it.
        handle = self.register_state_dict_post_hook(
            lambda _, saved: describe(self._registry.whole(saved), self._chain), prepend=True
        )
        removed = {p for p in state if isinstance(p, Tensor) and p not in held}
        if removed:  # they have no number to be saved under
            self.state = defaultdict(dict, {p: s for p, s in state.items() if p not in removed})
        try:
            return super().state_dict()
        finally:
            self.state = state
            handle.remove()

    def load_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], strict: bool = True
    ) -> LoadResult:
        """Load what `state_dict()` gave, now or in an older version.

        strict: False loads what matches, and the result says what it left: parameters match by name
            where both sides have names, else by place; state matches by key and shape.

        Errors: ValueError if the dict is of a newer version, is none, or holds numbers that cannot be;
            with `strict`, if it was saved by another chain, for other names, or by torch.optim.
            Whatever is raised, nothing has been changed then.
        """
        if not isinstance(state_dict, Mapping):
            with self._registry.agreeing():
                check_form(state_dict)
        results = []

        def capture(_: Optimizer, loading: dict[str, Any]) -> dict[str, Any]:
            with self._registry.agreeing():
                check_form(loading)
                fitted = fit(self._registry, migrate(loading), strict)
            self._loading = fitted.states
            results.append(fitted.left)
            return fitted.numbered()

        # Registered last, so it sees what the user's own hooks made of the dict.
        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            with all_or_nothing(self.__dict__):
                super().load_state_dict(dict(state_dict))
        finally:
            handle.remove()
            self.__dict__.pop("_loading", None)
        return results[0]
