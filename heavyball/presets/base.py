"""Options shared by all presets, around the chain of each preset."""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypedDict

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import Shared, check_live, in_tuples, nonnegative
from heavyball.core.rate import Rate
from heavyball.core.transform import Transform
from heavyball.errors import nearest
from heavyball.optim.checks import TORCH_SWITCHES
from heavyball.optim.optimizer import ChainOpt
from heavyball.state.formats import Choice

CLIPPINGS: dict[str, Transform] = {
    "l2_clip": C.clip_by_norm,
    "rms_clip": C.clip_by_rms,
    "global_norm_clip": C.clip_by_global_norm,
    "last_norm_clip": C.clip_by_last_norm,
    "agc": C.adaptive_gradient_clip,
    "l2_normalize": C.l2_normalize,
    "rms_normalize": C.rms_normalize,
    "trust_region": C.trust_region,
    "mu_law": C.mu_law,
    "a_law": C.a_law,
    "softsign": C.softsign,
    "clip_update_rms": C.clip_update_rms,
}
Clipping = str | Transform | Callable[[Tensor], Tensor] | None


class OptionsButRounding(TypedDict, total=False):
    """Options of every preset, except `stochastic_rounding`, which some presets list themselves.

    warmup_steps: lr grows linearly over this many steps.
    caution: zero update entries whose sign differs from the gradient's (`cautious`); with
        `schedule_free`, entries of the change of y.
    mars, mars_gamma: variance reduction (`mars` without its clip), with the preset's beta1.
    gradient_clipping, update_clipping: a name (see `heavyball.presets.CLIPPINGS`), a transform, or a
        function of a tensor, applied to the gradient or to the final update.
    palm, beta2_scale: PaLM's schedule for beta2, 1 - t^(-beta2_scale).
    foreach: False steps one parameter at a time, which minimizes peak memory.
    compile, stochastic_rounding, seed, fuse_backward, storage_dtype, ecc, param_ecc, replicas, stages,
    metrics, fused, capturable, differentiable: as in `ChainOpt`.
    """

    warmup_steps: float
    caution: bool
    mars: bool
    mars_gamma: float
    gradient_clipping: Clipping
    update_clipping: Clipping
    palm: bool
    beta2_scale: float
    foreach: bool | None
    compile: bool | str
    seed: int
    fuse_backward: bool
    storage_dtype: Choice
    ecc: Choice
    param_ecc: str | None
    replicas: Any
    stages: Any
    metrics: bool
    fused: bool | None
    capturable: bool
    differentiable: bool


class PresetOptions(OptionsButRounding, total=False):
    """Options of every preset; `stochastic_rounding` is as in `ChainOpt`."""

    stochastic_rounding: bool


DEFAULTS: dict[str, Any] = {
    "warmup_steps": 0,
    "caution": False,
    "mars": False,
    "mars_gamma": 0.0025,
    "gradient_clipping": None,
    "update_clipping": None,
    "palm": False,
    "beta2_scale": 0.8,
    "foreach": None,
    "compile": "auto",
    "stochastic_rounding": True,
    "seed": 0,
    "fuse_backward": False,
    "storage_dtype": None,
    "ecc": None,
    "param_ecc": None,
    "replicas": None,
    "stages": None,
    "metrics": False,
}


# What ChainOpt takes under the same name.
PASSED_ON = (
    "warmup_steps",
    "foreach",
    "compile",
    "stochastic_rounding",
    "seed",
    "storage_dtype",
    "ecc",
    "param_ecc",
    "fuse_backward",
    "replicas",
    "stages",
    "metrics",
)


class Preset(ChainOpt):
    """A named chain with the options that every preset takes, see `PresetOptions`."""

    listed = False

    palm_default = False
    # whether its steps are given more than gradients: the loss, or signals of the model
    takes_inputs = False
    # options of this family of presets that are not those of all presets
    more_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    # by entry of torch's groups: how this one was built, what is usual, the option that says so, and
    # what means the same
    _built: Mapping[str, tuple[Any, ...]] = MappingProxyType({})

    def built_with(self, **entries: tuple[Any, ...]) -> None:
        """Record how the chain is built, for entries that torch.optim's groups may set differently.

        entries: for each entry of a group, the value here, torch's default, the option's name, and
            other spellings of the value. Groups have those that are not torch's default, so that
            torch's optimizer does the same with them.
        """
        self._built = {**self._built, **in_tuples(entries)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in `ChainOpt`; raises for entries of torch.optim that this chain does not support."""
        entries = self._built if isinstance(param_group, dict) else {}
        for key, (own, usual, option, *alike) in entries.items():
            value = in_tuples(param_group.get(key, usual))
            if value not in (own, usual, *alike):
                raise ValueError(
                    f"parameter group: {key}={value!r} has no effect, because it is {own!r}: it "
                    f"cannot be set per group, pass {option} to {type(self).__name__}"
                )
        super().add_param_group(param_group)
        told = {key: own for key, (own, usual, *_) in entries.items() if own != usual}
        self.param_groups[-1].update(told)

    def build(
        self,
        params: Any,
        lr: float | Tensor,
        chain: tuple[Any, ...] | Callable[[tuple[Transform, ...]], tuple[Any, ...]],
        options: PresetOptions,
        *,
        beta1: float | Shared = 0.95,
        writer: Transform | None = None,
        last: tuple[Any, ...] = (),
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        """Put the common options around the preset's own chain, and build the optimizer.

        chain: the elements, or a function that puts PaLM's schedule where it belongs among them.
        last: elements after everything else, such as writers for some of the parameters.
        beta1: the first moment's beta, used by MARS; the authors' 0.95 if there is none.
        """
        chosen = _checked_options(type(self), options)
        caution = chosen["caution"]
        elements: list[Any] = [C.maximize] if flag("maximize", maximize) else []
        self.built_with(maximize=(maximize, False, "maximize"))
        if chosen["mars"]:
            elements.append(C.mars(gamma=chosen["mars_gamma"], beta1=beta1, max_norm=None))
        elements += _clipping("gradient_clipping", chosen["gradient_clipping"])
        palm = (C.palm_beta2(beta2_scale=chosen["beta2_scale"]),) if chosen["palm"] else ()
        elements += chain(palm) if callable(chain) else palm + chain
        elements += _clipping("update_clipping", chosen["update_clipping"])
        if caution and writer is None:
            elements.append(C.cautious)
        if writer is not None:
            if caution and "caution" in writer.options:
                writer = writer(caution="cautious")
            elif caution:
                elements.append(C.cautious)
            elements.append(writer)
        ChainOpt.__init__(
            self,
            params,
            lr,
            *elements,
            *last,
            weight_decay=weight_decay,
            **{name: chosen[name] for name in (*PASSED_ON, *TORCH_SWITCHES) if name in chosen},
        )


def _checked_options(preset: type[Preset], options: PresetOptions) -> dict[str, Any]:
    own = [n for n in inspect.signature(preset.__init__).parameters if n not in ("self", "options")]
    own += preset.more_options
    for name in options:
        if name not in DEFAULTS and name not in TORCH_SWITCHES:
            raise TypeError(
                f"{preset.__name__} has no option {name!r}; {nearest(name, [*own, *DEFAULTS])}"
            )
    chosen = {**DEFAULTS, "palm": preset.palm_default, **options}
    for name in ("caution", "mars", "palm"):
        flag(name, chosen[name])
    check_live("mars_gamma", chosen["mars_gamma"], 0.0, nonnegative)
    for name, switch in (("mars_gamma", "mars"), ("beta2_scale", "palm")):
        if name in options and not chosen[switch]:
            raise ValueError(f"{name}={options[name]!r} has no effect without {switch}=True")  # type: ignore[literal-required]
    return chosen


def split_options(
    options: Mapping[str, Any], family: Mapping[str, Any]
) -> tuple[dict[str, Any], PresetOptions]:
    """Those options that a family of presets has, and the others."""
    mine = {name: value for name, value in options.items() if name in family}
    rest = {name: value for name, value in options.items() if name not in family}
    return mine, rest  # type: ignore[return-value]


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: expected True or False")
    return value


def _clipping(option: str, value: Clipping) -> list[Transform]:
    if isinstance(value, str):
        if value not in CLIPPINGS:
            raise ValueError(f"{option}={value!r}; {nearest(value, CLIPPINGS)}")
        value = CLIPPINGS[value]
    if isinstance(value, Rate) and option == "update_clipping":
        raise ValueError(
            f"update_clipping={value!r}: it clips gradients, pass it as gradient_clipping"
        )
    if value is None or isinstance(value, Transform):
        return [] if value is None else [value]
    if callable(value):
        return [C.apply(fn=value)]
    raise TypeError(
        f"{option}={value!r}: expected a transform, a function, or one of {', '.join(CLIPPINGS)}"
    )
