"""NAdam: Adam with Nesterov's look-ahead and a rising momentum."""

from torch import Tensor

from heavyball.core.hyper import Live
from heavyball.core.transform import transform
from heavyball.numerics import EpsPlacement, lerp, root, second_moment
from heavyball.state.declare import scalar, squares, zeros


@transform(exp_avg=zeros, exp_avg_sq=squares, mu_product=scalar(1.0, low=0.0))
def scale_by_nadam(
    update: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    mu_product: Tensor,
    *,
    step: Tensor,
    scheduled_beta2: Tensor | None = None,
    betas: Live = (0.9, 0.999),
    eps: Live = 1e-8,
    momentum_decay: Live = 4e-3,
    eps_placement: EpsPlacement = "outside",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adam with Nesterov momentum.

    mu_t = beta1 (1 - 0.96^(t psi) / 2), psi = momentum_decay;  P_t = mu_1 .. mu_t
    m <- beta1 m + (1 - beta1) g;  v as in `scale_by_adam`
    u = [(1 - mu_t) g / (1 - P_t) + mu_(t+1) m / (1 - P_t mu_(t+1))] / (sqrt(v) + eps)

    Shapes: all (*).
    Units: the result is dimensionless.
    Source: Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ; torch.optim.NAdam.
    """
    mu = betas[0] * (1 - 0.5 * 0.96 ** (step * momentum_decay))
    mu_next = betas[0] * (1 - 0.5 * 0.96 ** ((step + 1) * momentum_decay))
    mu_product = mu_product * mu
    exp_avg = lerp(exp_avg, update, 1 - betas[0])
    exp_avg_sq = second_moment(exp_avg_sq, update, betas[1], step, scheduled_beta2)
    now = (1 - mu) / (1 - mu_product) * update
    ahead = mu_next / (1 - mu_product * mu_next) * exp_avg
    denominator = root(exp_avg_sq, eps, eps_placement, 1 - betas[1] ** step)
    return (now + ahead) / denominator, exp_avg, exp_avg_sq, mu_product
