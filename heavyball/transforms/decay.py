"""Weight decay: terms that the write takes off the parameter together with the update.

Each adds a term D to the update, so the step is p - lr (u + D) with the parameter of before the
step, and a decay works with every writer. `weight_decay` is called wd below.
"""

import torch
from torch import Tensor

from heavyball.core.hyper import Live, largest_lr
from heavyball.core.transform import DEFAULTS, transform
from heavyball.numerics import ema
from heavyball.state.declare import copy_of_param, scalar, zeros


@transform(kind="decay", provides=("decay_rate",))
def decoupled(
    update: Tensor, *, param: Tensor, decayed: Tensor | None = None, weight_decay: Live = 0.0
) -> tuple[Tensor, Tensor]:
    """Decoupled weight decay, proportional to the learning rate; the default.

    D = wd p, so p <- p (1 - lr wd) - lr u. After `focus`, wd times the averaged weight.
    It provides wd as `decay_rate` for writers that decay at another point.

    Units: `weight_decay` is per unit of `lr` and step.
    Source: Loshchilov and Hutter 2017, Algorithm 2, https://arxiv.org/abs/1711.05101.
    """
    return update + weight_decay * (param if decayed is None else decayed), weight_decay


DEFAULTS["decay"] = decoupled


@transform()
def coupled(update: Tensor, *, param: Tensor, weight_decay: Live = 0.0) -> Tensor:
    """L2 regularization: add the decay to the gradient, so that later elements scale it too.

    u' = u + wd p

    Source: `weight_decay` of torch.optim.SGD, RMSprop and NAdam.
    """
    return update + weight_decay * param


@transform(provides=("grad",))
def regularized(
    update: Tensor, *, grad: Tensor, param: Tensor, weight_decay: Live = 0.0
) -> tuple[Tensor, Tensor]:
    """`coupled`, also for elements that compare with the gradient.

    u' = u + wd p, and g' = g + wd p

    Source: `decouple=False` of prodigyopt, whose estimate takes the decay for part of the gradient.
    """
    return update + weight_decay * param, grad + weight_decay * param


@transform(kind="decay", lr_max=scalar(0.0, low=0.0), domains={"peak_lr": largest_lr})
def independent(
    update: Tensor,
    lr_max: Tensor,
    *,
    param: Tensor,
    base_lr: Tensor,
    weight_decay: Live = 0.0,
    peak_lr: Live = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weight decay that follows the learning-rate schedule but not its scale.

    D = wd p / lr_peak, so p <- p (1 - wd lr / lr_peak) - lr u

    `peak_lr` is lr_peak. 0 stands for the largest value of the group's schedule (`lr=C.wsd(...)`), or
    without one for the largest `lr` so far, without warm-up. A torch scheduler that increases lr
    (OneCycleLR) needs `peak_lr`.

    Units: `weight_decay` is the fraction of the weights removed by a step at the peak.
    Source: Schaipp 2024, https://fabian-sp.github.io/posts/2024/02/decoupling/.
    """
    lr_max, peak = _peak(lr_max, base_lr, peak_lr)
    # nothing moves at lr = 0, and no peak is known then
    share = torch.where(peak > 0, weight_decay / peak, 0.0)
    return update + share * param, lr_max


@transform(kind="decay", lr_max=scalar(0.0, low=0.0), domains={"peak_lr": largest_lr})
def adamc(
    update: Tensor,
    lr_max: Tensor,
    *,
    param: Tensor,
    base_lr: Tensor,
    lr: Tensor,
    weight_decay: Live = 0.0,
    peak_lr: Live = 0.0,
) -> tuple[Tensor, Tensor]:
    """Weight decay for layers followed by normalization, corrected for the learning-rate schedule.

    D = wd (lr / lr_peak) p, so p <- p (1 - wd lr^2 / lr_peak) - lr u; `peak_lr` as in `independent`.

    Source: Defazio 2025, Algorithm 1, https://arxiv.org/abs/2506.02285.
    """
    lr_max, peak = _peak(lr_max, base_lr, peak_lr)
    ratio = torch.where(peak > 0, lr / peak, 0.0)
    return update + weight_decay * ratio * param, lr_max


def _peak(lr_max: Tensor, base_lr: Tensor, peak_lr: Tensor) -> tuple[Tensor, Tensor]:
    lr_max = torch.maximum(lr_max, base_lr)
    return lr_max, torch.where(peak_lr > 0, peak_lr, lr_max)


@transform(kind="decay", provides=("shrink",), modifier=True)
def separate_decay(
    update: Tensor, *, param: Tensor, lr: Tensor, weight_decay: Live = 0.0, by_lr: bool = True
) -> tuple[Tensor, Tensor]:
    """Weight decay separate from the update, so that masks and normalizations do not affect it.

    p <- p - lr wd p - lr u;  by_lr=False: p <- p - wd p - lr u, independent of lr

    Before `schedule_free` it acts at y: z receives all of it, y the same share as of the update. Only
    `descend` and `schedule_free` support it.

    Units: `weight_decay` is per unit of `lr` and step, or with by_lr=False per step.
    Source: `weight_decay_by_lr` of prodigy-plus-schedule-free.
    """
    return update, (lr * weight_decay if by_lr else weight_decay) * param


@transform(kind="decay")
def cautious_decay(update: Tensor, *, param: Tensor, weight_decay: Live = 0.0) -> Tensor:
    """Decay only the entries that the update does not move away from zero.

    D = wd p where u p >= 0, else 0; an entry whose update is exactly 0 decays

    Source: Chen et al. 2025, Algorithm 1, https://arxiv.org/abs/2510.12402.
    """
    agree = update.sign() * param.sign() >= 0
    return update + weight_decay * torch.where(agree, param, 0.0)


@transform(kind="decay")
def proximal_decay(
    update: Tensor, *, param: Tensor, lr: Tensor, weight_decay: Live = 0.0
) -> Tensor:
    """Proximal weight decay: shrink the weights after the step.

    D = (wd p - lr wd u) / (1 + lr wd), so p <- (p - lr u) / (1 + lr wd)

    Units: `weight_decay` is per unit of `lr` and step, as that of `decoupled`.
    Source: Zhuang et al. 2022, https://arxiv.org/abs/2202.00089; Adan.
    """
    return (update + weight_decay * param) / (1 + lr * weight_decay)


@transform(kind="decay", anchor=copy_of_param)
def anchor_decay(
    update: Tensor, anchor: Tensor, *, param: Tensor, weight_decay: Live = 0.0
) -> tuple[Tensor, Tensor]:
    """Decay the weights towards their initial values, for fine-tuning.

    D = wd (p - p_1), p_1 the parameter before its first step

    Units: `weight_decay` is per unit of `lr` and step.
    Source: Li, Grandvalet and Davoine 2018, L2-SP, https://arxiv.org/abs/1802.01483, decoupled.
    """
    return update + weight_decay * (param - anchor), anchor


@transform(kind="decay")
def l1_decay(update: Tensor, *, param: Tensor, weight_decay: Live = 0.0) -> Tensor:
    """L1 weight decay: the same amount for every weight, which drives weights to zero.

    D = wd sign(p)
    """
    return update + weight_decay * param.sign()


@transform(kind="decay")
def palm_decay(update: Tensor, *, param: Tensor, lr: Tensor, weight_decay: Live = 0.0) -> Tensor:
    """Weight decay proportional to the square of the learning rate.

    D = wd lr p, so p <- p (1 - wd lr^2) - lr u

    Source: Chowdhery et al. 2022, section 5, https://arxiv.org/abs/2204.02311.
    """
    return update + weight_decay * lr * param


@transform(kind="decay", decay_target=zeros.holding("weights"))
def decay_to_ema(
    update: Tensor,
    decay_target: Tensor,
    *,
    param: Tensor,
    step: Tensor,
    lr: Tensor,
    weight_decay: Live = 0.0,
    beta: Live = 0.999,
) -> tuple[Tensor, Tensor]:
    """Decay the weights towards their own running mean instead of towards zero.

    e <- unbiased mean of p_1..p_t with `beta`;  D = wd (p - e) / lr,
    so p <- p + wd (e - p) - lr u; nothing moves at lr = 0.

    Units: `weight_decay` is the fraction of the distance to the mean covered per step.
    Source: `weight_decay_to_ema` of HeavyBall 1.0.
    """
    decay_target = ema(decay_target, param, beta, step)
    share = torch.where(lr > 0, weight_decay / lr, 0.0)
    return update + share * (param - decay_target), decay_target
