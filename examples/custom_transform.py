"""A custom optimizer: a new transform, in a chain that treats matrices differently from the rest.

python examples/custom_transform.py
"""

import torch
from torch import Tensor, nn

import heavyball
from heavyball.chainable import Live, transform, zeros

C = heavyball.chainable


@transform(mean=zeros)
def agreeing(update: Tensor, mean: Tensor, *, beta: Live = 0.9) -> tuple[Tensor, Tensor]:
    """Keep the entries whose sign is that of their running mean.

    m <- beta m + (1 - beta) u,  u <- u [u m > 0]
    """
    mean = beta * mean + (1 - beta) * update
    return torch.where(update * mean > 0, update, 0), mean


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    opt = C.ChainOpt(
        model.named_parameters(),
        0.003,
        C.route(C.when(C.muon(scale="match_rms_adamw"), min_ndim=2), otherwise=(C.scale_by_adam,)),
        agreeing(beta=0.8),
        weight_decay=0.01,
        warmup_steps=10,
    )
    print(opt.routing())
    points = torch.randn(256, 8)
    target = points[:, :1] * points[:, 1:2]
    for step in range(201):
        opt.zero_grad()
        loss = nn.functional.mse_loss(model(points), target)
        loss.backward()
        opt.step()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
