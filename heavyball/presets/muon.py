"""Muon and its relatives, with AdamW for the parameters that are not matrices in their sense."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.core.hyper import check_live, nonnegative, shared
from heavyball.core.transform import Transform
from heavyball.linalg.orthogonalize import Products
from heavyball.optim.checks import checked_lr
from heavyball.presets.base import Preset, PresetOptions, split_options
from heavyball.transforms.muon import Method, Scale, muon, scale_by_normuon

# Whose rows stand for something of their own, such as words: embeddings, output layers, and norms.
ADAMW_NAMES = (
    "*embed*",
    "*embd*",
    "*_emb.*",
    "*.emb.*",
    "emb.*",
    "*wte.*",
    "*wpe.*",
    "head.*",
    "*.head.*",
    "*_head.*",
    "*classifier.*",
    "*norm*",
    "*bias",
)
# Without a name, a matrix with so many rows, and so many times more than columns, is taken for one.
VOCABULARY, TALL = 4096, 8

Predicate = Callable[[str | None, Tensor], bool]


@dataclass(frozen=True)
class IsHidden:
    """Which parameters Muon is for: matrices and kernels, but no embedding, head, norm or bias.

    They are told by their names. A parameter without a name that has two dimensions is taken for an
    embedding or a head if it has VOCABULARY rows or more and TALL times as many as columns.
    """

    adamw_names: tuple[str, ...] = ADAMW_NAMES

    def __repr__(self) -> str:
        return "IsHidden()" if self.adamw_names == ADAMW_NAMES else f"IsHidden({self.adamw_names})"

    def __call__(self, name: str | None, param: Tensor) -> bool:
        if param.ndim < 2:
            return False
        if name is not None:
            return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.adamw_names)
        rows = param.shape[0]
        return param.ndim > 2 or rows < max(VOCABULARY, TALL * param.shape[1])


class _Routed(TypedDict, total=False):
    adamw_lr: float
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_names: tuple[str, ...]
    use_muon: Predicate | None


class RoutedOptions(PresetOptions, _Routed, total=False):
    """Options of the presets in this file, besides those of every preset.

    adamw_lr: the learning rate of AdamW's parameters at the beginning. It is kept as the factor
        `adamw_lr_scale` in the group, so that both follow one schedule.
    adamw_betas, adamw_eps: as AdamW's betas and eps.
    adamw_names: patterns of the names of parameters that AdamW gets, in place of ADAMW_NAMES.
    use_muon: `fn(name, parameter) -> bool`, which decides in place of names and shapes.
    """


ROUTED_DEFAULTS: dict[str, Any] = {
    "adamw_lr": 3e-4,
    "adamw_betas": (0.9, 0.95),
    "adamw_eps": 1e-8,
    "adamw_names": None,
    "use_muon": None,
}


class RoutedPreset(Preset):
    """A preset that gives matrices one chain and everything else AdamW."""

    listed = False

    more_options = ROUTED_DEFAULTS

    def build_routed(
        self,
        params: Any,
        lr: float | Tensor,
        rule: Transform,
        options: RoutedOptions,
        *,
        weight_decay: float,
    ) -> None:
        """Put the rule beside AdamW, and the common options around both."""
        mine, common = split_options(options, ROUTED_DEFAULTS)
        chosen = {**ROUTED_DEFAULTS, **mine}
        adamw_lr = check_live("adamw_lr", chosen["adamw_lr"], 0.0, nonnegative)
        # where lr begins at 0 there is no ratio to keep
        ratio = adamw_lr / float(lr) if float(checked_lr(lr)) else 1.0
        betas = shared("adamw_betas", chosen["adamw_betas"])
        eps = shared("adamw_eps", chosen["adamw_eps"])
        adam = C.scale_by_adam(betas=betas, eps=eps)
        scaled = C.scale_lr(factor=shared("adamw_lr_scale", ratio))
        hidden = C.when(rule, predicate=_chosen_rule(chosen))
        self.build(
            params,
            lr,
            lambda palm: (C.route(hidden, otherwise=(*palm, adam, scaled)),),
            common,
            beta1=rule.hyper["momentum"],
            weight_decay=weight_decay,
        )


def _chosen_rule(chosen: dict[str, Any]) -> Predicate:
    names, predicate = chosen["adamw_names"], chosen["use_muon"]
    if names is not None and predicate is not None:
        raise ValueError(f"adamw_names={names!r} has no effect with use_muon; give one of them")
    if predicate is not None:
        return predicate
    if names is None:
        return IsHidden()
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adamw_names={names!r}: expected a tuple of patterns such as '*embed*'")
    return IsHidden(tuple(names))


class Muon(RoutedPreset):
    """Momentum with all singular values near 1 for matrices; AdamW for everything else.

    Embeddings, heads, norms and biases go to AdamW. They are told by their names where the parameters
    come as `model.named_parameters()` (`heavyball.presets.muon.ADAMW_NAMES`), else by shape: fewer than
    two dimensions, or a matrix with over 4095 rows and 8 times as many as columns, such as that of a
    vocabulary; a small embedding or head is not told without its name. `adamw_names` and `use_muon`
    decide otherwise, and `print(opt.routing())` shows who got what.

    method, scale, stacked, products: as in `muon`. With scale="match_rms_adamw" an update has the size
        of AdamW's, so that adamw_lr may be lr.

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
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)


class NorMuon(RoutedPreset):
    """Muon whose rows are brought to one size by their running mean squares; AdamW for the rest.

    Which parameters are for AdamW, and the options for it, are those of `Muon`.

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
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)
