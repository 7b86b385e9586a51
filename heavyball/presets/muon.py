"""Muon and similar optimizers, with AdamW for parameters that are not hidden matrices."""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import check_live, nonnegative, shared
from heavyball.core.transform import Transform
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.orthogonalize import TABLES, Products
from heavyball.optim.arguments import kinds_of, model_of
from heavyball.optim.checks import checked_lr
from heavyball.optim.scheduling import base_and_schedule
from heavyball.presets.base import Preset, PresetOptions, split_options
from heavyball.transforms.muon import Method, Scale, muon, scale_by_normuon

# Whose rows stand for something of their own, such as words: embeddings, output layers, and norms.
ADAMW_NAMES = (
    "*embed*",
    "*embd*",
    "*_emb",
    "*_emb.*",
    "*.emb.*",
    "emb.*",
    "*_token",
    "*_tokens",
    "*wte.*",
    "*wpe.*",
    "shared.*",
    "*.shared.*",
    "head.*",
    "*.head.*",
    "*_head.*",
    "*logits*",
    "*classifier.*",
    "*norm*",
    "*bias",
)
# Output layers where nothing before them is counted, as blocks are: `fc`, not `blocks.0.fc`.
LAST_NAMES = ("fc", "output", "score")
# Without a name, a matrix with so many rows, and so many times more than columns, is taken for one.
VOCABULARY, TALL = 4096, 8

Predicate = Callable[[str | None, Tensor], bool]


@dataclass(frozen=True)
class IsNamed:
    """Whether the name of a parameter matches one of the patterns."""

    patterns: tuple[str, ...]

    def __call__(self, name: str | None, param: Tensor) -> bool:
        return self.reason(name, param)[0]

    def reason(self, name: str | None, param: Tensor) -> tuple[bool, str]:
        """Whether the parameter's name matches, and which pattern."""
        for pattern in self.patterns:
            if name is not None and fnmatch.fnmatchcase(name, pattern):
                return True, f"its name matches {pattern!r}"
        return False, "no name matches"


@dataclass(frozen=True)
class IsHidden:
    """Whether a parameter is a hidden matrix or kernel: no embedding, head, norm or bias.

    Parameters are identified by the types of their modules if a model was given, then by their names,
    ignoring case. A two-dimensional parameter without a name counts as an embedding or a head if it
    has at least VOCABULARY rows and TALL times as many rows as columns.

    kinds: the names of parameters whose modules are embeddings or norms.
    """

    adamw_names: tuple[str, ...] = ADAMW_NAMES
    kinds: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        given = [] if self.adamw_names == ADAMW_NAMES else [repr(self.adamw_names)]
        return f"IsHidden({', '.join([*given, *([f'kinds={self.kinds}'] if self.kinds else [])])})"

    @property
    def description(self) -> str:
        """Its text in a state dict, which does not record whether names or types were used."""
        return repr(replace(self, kinds=()))

    def __call__(self, name: str | None, param: Tensor) -> bool:
        return self.reason(name, param)[0]

    def reason(self, name: str | None, param: Tensor) -> tuple[bool, str]:
        """Whether a parameter is for Muon, and why."""
        if param.ndim < 2:
            return False, f"it has {param.ndim} dimension{'s' * (param.ndim != 1)}"
        if name is None:
            rows, columns = param.shape[:2]
            if param.ndim == 2 and rows >= max(VOCABULARY, TALL * columns):
                return False, "without a name, its shape is that of a vocabulary"
            return True, "without a name, its shape is that of a hidden layer"
        kind = dict(self.kinds).get(name)
        if kind is not None:
            return False, f"its module is {kind}"
        lower = name.lower()
        for pattern in self.adamw_names:
            if fnmatch.fnmatchcase(lower, pattern.lower()):
                return False, f"its name matches {pattern!r}"
        *path, _ = lower.split(".")
        counted = any(part.isdigit() for part in path)
        if self.adamw_names == ADAMW_NAMES and path[-1:] and path[-1] in LAST_NAMES and not counted:
            return False, f"{path[-1]!r} is the name of a last layer"
        return True, "its name is that of no embedding, head or norm"


class _Routed(TypedDict, total=False):
    adamw_lr: float
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_names: tuple[str, ...]
    use_muon: Predicate | None


class RoutedOptions(PresetOptions, _Routed, total=False):
    """Options of the presets in this file, in addition to those of every preset.

    adamw_lr: the initial learning rate for AdamW's parameters, or its peak with a schedule. It is
        stored as the factor `adamw_lr_scale` in the group, so both learning rates follow the same
        schedule.
    adamw_betas, adamw_eps: as AdamW's betas and eps.
    adamw_names: name patterns of parameters for AdamW, instead of ADAMW_NAMES.
    use_muon: `fn(name, parameter) -> bool`, decides instead of names and shapes.
    """


ROUTED_DEFAULTS: dict[str, Any] = {
    "adamw_lr": 3e-4,
    "adamw_betas": (0.9, 0.95),
    "adamw_eps": 1e-8,
    "adamw_names": None,
    "use_muon": None,
}


class RoutedPreset(Preset):
    """A preset with one chain for hidden matrices and AdamW for everything else."""

    listed = False

    more_options = ROUTED_DEFAULTS

    def build_routed(
        self,
        params: Any,
        lr: float | Tensor,
        rule: Transform | tuple[Transform, ...],
        options: RoutedOptions,
        *,
        writer: Transform | None = None,
        narrowed: Callable[[Predicate], Predicate] | None = None,
        behind: tuple[Any, ...] = (),
        weight_decay: float = 0.0,
    ) -> None:
        """Route parameters to the rule or AdamW, and put the common options around both.

        writer: replaces the plain write for the rule's parameters.
        narrowed: restricts the rule to some of the parameters.
        behind: elements after the write.
        """
        elements = (rule,) if isinstance(rule, Transform) else rule
        mine, common = split_options(options, ROUTED_DEFAULTS)
        chosen = {**ROUTED_DEFAULTS, **mine}
        adamw_lr = check_live("adamw_lr", chosen["adamw_lr"], 0.0, nonnegative)
        # where lr begins at 0 there is no ratio to keep
        base = float(checked_lr(base_and_schedule(lr)[0]))
        ratio = adamw_lr / base if base else 1.0
        betas = shared("adamw_betas", chosen["adamw_betas"])
        eps = shared("adamw_eps", chosen["adamw_eps"])
        adam = C.scale_by_adam(betas=betas, eps=eps)
        scaled = C.scale_lr(factor=shared("adamw_lr_scale", ratio))
        matrices = which_are_hidden(params, chosen, ("adamw_names", "use_muon"))
        matrices = matrices if narrowed is None else narrowed(matrices)
        hidden = C.when(*elements, predicate=matrices)
        last = (
            () if writer is None else (C.route(C.when(writer, predicate=matrices), otherwise=()),)
        )
        self.build(
            params,
            lr,
            lambda palm: (C.route(hidden, otherwise=(*palm, adam, scaled)),),
            common,
            last=(*last, *behind),
            beta1=next((t.hyper["momentum"] for t in elements if "momentum" in t.hyper), 0.95),
            weight_decay=weight_decay,
        )


def which_are_hidden(params: Any, chosen: Mapping[str, Any], options: tuple[str, str]) -> Predicate:
    """The rule for hidden matrices, from two options: name patterns of other parameters, and a function.

    Errors: ValueError or TypeError naming the option.
    """
    names, predicate = (chosen[option] for option in options)
    if names is not None and predicate is not None:
        raise ValueError(
            f"{options[0]}={names!r} has no effect with {options[1]}; pass only one of them"
        )
    if predicate is not None:
        return predicate
    if names is not None and (
        isinstance(names, str) or not all(isinstance(name, str) for name in names)
    ):
        raise TypeError(f"{options[0]}={names!r}: expected a tuple of patterns such as '*embed*'")
    hidden = IsHidden() if names is None else IsHidden(tuple(names))
    model = model_of(params)
    return hidden if model is None else replace(hidden, kinds=tuple(kinds_of(model).items()))


class Muon(RoutedPreset):
    """Orthogonalized momentum for hidden matrices; AdamW for everything else.

    Embeddings, heads, norms and biases use AdamW. They are identified by the types of their modules if a
    model is given, and by their names if `model.named_parameters()` is given
    (`heavyball.presets.muon.ADAMW_NAMES`). Without names, parameters with fewer than two dimensions use
    AdamW, and so do matrices with at least 4096 rows and 8 times as many rows as columns, such as a
    vocabulary's; a small embedding or head cannot be identified without its name. `adamw_names` and
    `use_muon` override this, and `print(opt.routing())` shows which parameter got which and why.

    method, scale, stacked, products, blocks, axis: as in `muon`; `blocks` may be given by names,
        {"*.in_proj_weight": 3}. With scale="match_rms_adamw", updates have the size
        of AdamW's, so adamw_lr can equal lr.

    Units: with "original", `lr` is about the spectral norm of a step.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; torch.optim.Muon.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        method: Method = "quintic",
        scale: Scale = "original",
        eps: float = 1e-7,
        stacked: bool = False,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        weight_decay: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        rule = muon(
            momentum=momentum,
            nesterov=nesterov,
            steps=ns_steps,
            method=method,
            scale=scale,
            eps=eps,
            stacked=stacked,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        quintic = TABLES["quintic"]
        rows = quintic if method == "quintic" else method
        self.built_with(
            nesterov=(nesterov, True, "nesterov"),
            ns_steps=(ns_steps, 5, "ns_steps"),
            ns_coefficients=(rows[0] if len(rows) == 1 else rows, quintic[0], "method"),
            # torch says None for "original"
            adjust_lr_fn=(None, None, "scale", "original")
            if scale == "original"
            else (scale, None, "scale"),
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)


class NorMuon(RoutedPreset):
    """Muon with rows normalized by their running mean squares; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, and takes the same options.

    Units: `lr` is about the spectral norm of a step.
    Source: Li et al. 2025, https://arxiv.org/abs/2510.05491.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        method: Method = "quintic",
        scale: Scale = "original",
        eps: float = 1e-7,
        stacked: bool = False,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        weight_decay: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        rule = scale_by_normuon(
            momentum=momentum,
            beta2=beta2,
            nesterov=nesterov,
            steps=ns_steps,
            method=method,
            scale=scale,
            eps=eps,
            stacked=stacked,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)
