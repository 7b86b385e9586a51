"""Fine-tuning with LoRA in plain torch: trainable low-rank matrices added to frozen weights.

python examples/lora.py
"""

import argparse

import torch
from torch import Tensor, nn

import heavyball


class Lora(nn.Module):
    """A frozen linear layer plus a trainable low-rank term: W x + (alpha / r) B A x."""

    def __init__(self, layer: nn.Linear, rank: int = 4, alpha: float = 8.0):
        super().__init__()
        self.layer, self.scale = layer.requires_grad_(False), alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)
        self.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.scale * (x @ self.lora_a.T @ self.lora_b.T)


def with_lora(model: nn.Module) -> nn.Module:
    """Replace each linear layer of the model by a Lora layer."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, Lora(child))
        else:
            with_lora(child)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16))
    points = torch.randn(256, 16)
    with torch.no_grad():
        wanted = model(points) + 0.3 * points.roll(1, 1)
    with_lora(model)
    # B gets a larger lr than A (Hayou et al. 2024); frozen weights are not passed
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n.endswith("lora_a")], "lr": 1e-3},
        {"params": [p for n, p in named if n.endswith("lora_b")], "lr": 16e-3},
    ]
    opt = heavyball.AdamW(groups, weight_decay=0.0, warmup_steps=steps // 30)
    total = sum(p.numel() for p in model.parameters())
    print(f"training {sum(p.numel() for _, p in named)} of {total} weights")
    losses = []
    for step in range(1, steps + 1):
        loss = nn.functional.mse_loss(model(points), wanted)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    with torch.no_grad():  # merge the adapters
        for part in model:
            if isinstance(part, Lora):
                part.layer.weight += part.scale * part.lora_b @ part.lora_a
                part.lora_b.zero_()
        merged = nn.functional.mse_loss(model(points), wanted).item()
    print("half of the loss is gone:", merged < losses[0] / 2)


if __name__ == "__main__":
    main()
