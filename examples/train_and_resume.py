"""Train a small model, stop in the middle, and resume from the checkpoint, bit for bit.

    python examples/train_and_resume.py --optimizer PrecondSchedulePaLMSOAP --steps 200

The data are two interleaved spirals, made here. `opt.eval()` and `opt.train()` do nothing for chains
that do not evaluate at an average, so a loop that calls them works with every optimizer.
"""

import argparse
import io
import math

import torch
from torch import Tensor, nn

import heavyball


def spirals(count: int) -> tuple[Tensor, Tensor]:
    """Points on two spiral arms in the plane, and the arm of each."""
    labels = torch.arange(count) % 2
    turn = torch.linspace(0.5, 3.0, count) * math.pi
    angle = turn + labels * math.pi
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 6
    return points + 0.02 * torch.randn_like(points), labels


def build(name: str, lr: float) -> tuple[nn.Module, heavyball.chainable.ChainOpt]:
    """A model and its optimizer, the same in every call."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
    )
    return model, heavyball.PRESETS[name](model.named_parameters(), lr=lr)


def train(
    model: nn.Module, opt: heavyball.chainable.ChainOpt, data: tuple[Tensor, Tensor], steps: int
) -> None:
    """Make `steps` full-batch steps."""
    points, labels = data
    model.train()
    opt.train()
    for _ in range(steps):
        opt.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        opt.step()


def accuracy(
    model: nn.Module, opt: heavyball.chainable.ChainOpt, data: tuple[Tensor, Tensor]
) -> float:
    """The accuracy with the evaluation weights."""
    points, labels = data
    model.eval()
    with torch.no_grad(), opt.averaged():
        return (model(points).argmax(1) == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="SFAdamW", choices=heavyball.PRESETS)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    torch.manual_seed(1)
    data = spirals(400)

    model, opt = build(given.optimizer, given.lr)
    train(model, opt, data, given.steps // 2)
    checkpoint = io.BytesIO()  # or a file name
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, checkpoint)
    train(model, opt, data, given.steps - given.steps // 2)

    resumed, other = build(given.optimizer, given.lr)
    checkpoint.seek(0)
    saved = torch.load(checkpoint, weights_only=True)
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, data, given.steps - given.steps // 2)

    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    same = all(torch.equal(one, two) for one, two in pairs)
    print(f"accuracy {accuracy(model, opt, data):.3f}, resumed run equal to the bit: {same}")


if __name__ == "__main__":
    main()
