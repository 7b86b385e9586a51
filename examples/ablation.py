"""Measure what each element of a chain contributes, by removing one at a time.

python examples/ablation.py "mars | scale_by_adam | cautious"

The command `heavyball ablate` does the same on larger tasks, with learning rates and a picture.
"""

import argparse
import statistics

import torch
from torch import nn

import heavyball

C = heavyball.chainable


def loss_after(elements: tuple, steps: int, seed: int) -> float:
    """The loss of a small regression after the given number of steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    points = torch.randn(512, 8)
    target = (points[:, :1] * points[:, 1:2]).sin()
    opt = C.ChainOpt(model.named_parameters(), 3e-3, *elements, compile=False)
    for _ in range(steps):
        batch = torch.randint(len(points), (64,))
        loss = nn.functional.mse_loss(model(points[batch]), target[batch])
        opt.zero_grad()
        loss.backward()
        opt.step()
    with opt.averaged(), torch.no_grad():
        return nn.functional.mse_loss(model(points), target).item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("chain", nargs="?", default="mars | scale_by_adam | cautious")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    full = C.parse(given.chain)
    shortened = [full[:i] + full[i + 1 :] for i in range(len(full))]
    for elements in (full, *filter(None, shortened)):
        losses = [loss_after(elements, given.steps, seed) for seed in range(given.seeds)]
        text = " | ".join(map(repr, elements))
        print(f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})  {text}")


if __name__ == "__main__":
    main()
