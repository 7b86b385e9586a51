"""Successors of Muon, with AdamW for parameters that are not hidden matrices."""

from collections.abc import Mapping
from typing import Any, Literal, Unpack

from torch import Tensor

from heavyball import chainable as C
from heavyball.linalg.matrices import Blocks
from heavyball.linalg.orthogonalize import Products
from heavyball.presets.muon import IsNamed, RoutedOptions, RoutedPreset
from heavyball.transforms.muon import Method, Scale

QK_NAMES = ("*q_proj*", "*k_proj*", "*query*", "*key*")


class AdaMuon(RoutedPreset):
    """Muon of the momentum's sign, divided by a running second moment; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, whose options, `blocks` and `axis` among them, apply.

    Units: updates have root mean square 0.2, as AdamW's, so lr and weight decay are AdamW's; 0.001 to
        0.02 in use.
    Source: Si, Zhang and Shen 2025, https://arxiv.org/abs/2507.11005.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        sign: bool = True,
        ns_steps: int = 5,
        method: Method = "quintic",
        eps: float = 1e-8,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        weight_decay: float = 0.01,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.scale_by_adamuon(
            momentum=momentum,
            beta2=beta2,
            nesterov=nesterov,
            sign=sign,
            steps=ns_steps,
            method=method,
            eps=eps,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)


class MuonClip(RoutedPreset):
    """Muon with query and key weights that shrink where attention logits grow; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, whose options, `blocks` and `axis` among them, apply.
    Before a step, pass the largest logit of every head to `feed("max_logits", S)`; a step without it is
    Muon's. Weights are identified by name, so pass a model or `model.named_parameters()`.

    heads, tau, exponent, signal: as in `qk_clip`; by name if layers differ, such as
        signal={"*layers.0.*": "layers.0", ..} and heads={"*q_proj*": 32, "*k_proj*": 8}.
    qk_names: name patterns of query and key weights.

    Units: with scale="match_rms_adamw", updates have the size of AdamW's, so lr and weight decay are
        AdamW's.
    Source: Kimi K2, https://arxiv.org/abs/2507.20534.
    """

    takes_inputs = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 2e-4,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        method: Method = "quintic",
        scale: Scale = "match_rms_adamw",
        eps: float = 1e-7,
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        heads: Blocks = 1,
        tau: float = 100.0,
        exponent: float = 0.5,
        signal: str | Mapping[str, str] = "max_logits",
        qk_names: tuple[str, ...] = QK_NAMES,
        weight_decay: float = 0.1,
        **options: Unpack[RoutedOptions],
    ):
        rule = C.muon(
            momentum=momentum,
            nesterov=nesterov,
            steps=ns_steps,
            method=method,
            scale=scale,
            eps=eps,
            products=products,
            blocks=blocks,
            axis=axis,
        )
        clip = C.qk_clip(heads=heads, tau=tau, exponent=exponent, signal=signal)
        clipped = C.when(clip, predicate=IsNamed(tuple(qk_names)))
        behind = (C.route(clipped, otherwise=()),)
        self.build_routed(params, lr, rule, options, behind=behind, weight_decay=weight_decay)


class Muon2(RoutedPreset):
    """Muon of the momentum over the root mean square of the gradient; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, whose options, `blocks` and `axis` among them, apply.

    factored: store the gradient's mean squares as row and column means (Muon^2-F).

    Units: with scale="original", `lr` is about the spectral norm of a step; 0.02 to 0.1 in use.
    Source: https://arxiv.org/abs/2604.09967.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        ns_steps: int = 5,
        method: Method = "quintic",
        eps: float = 1e-10,
        scale: Scale = "original",
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        factored: bool = False,
        weight_decay: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        rule = (
            C.muon_momentum(momentum=momentum),
            C.scale_by_gradient_rms(beta2=beta2, eps=eps, factored=factored),
            C.orthogonalize(
                method=method,
                steps=ns_steps,
                scale=scale,
                products=products,
                blocks=blocks,
                axis=axis,
            ),
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)


class AdaGO(RoutedPreset):
    """Muon with an Adagrad-norm step size; AdamW for the rest.

    AdamW gets the same parameters as in `Muon`, whose options, `blocks` and `axis` among them, apply.

    Units: `lr` is the spectral norm of the first step, `eps` that of the smallest; 0.01 to 0.1 in
        use.
    Source: Zhang et al. 2025, Algorithm 1, https://arxiv.org/abs/2509.02981.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.05,
        *,
        momentum: float = 0.95,
        gamma: float = 10.0,
        eps: float = 5e-4,
        ns_steps: int = 5,
        method: Method = "quintic",
        products: Products = "auto",
        blocks: Blocks = None,
        axis: Literal[0, 1] = 0,
        weight_decay: float = 0.0,
        **options: Unpack[RoutedOptions],
    ):
        rule = (
            C.muon_momentum(momentum=momentum, nesterov=False),
            C.orthogonalize(
                method=method, steps=ns_steps, products=products, blocks=blocks, axis=axis
            ),
            C.adagrad_norm_rate(gamma=gamma, eps=eps),
        )
        self.build_routed(params, lr, rule, options, weight_decay=weight_decay)
