"""A small language model from scratch: Muon for the matrices, AdamW for the rest, lr decaying to 0.

python examples/language_model.py FILE.txt    # any text; without one, this file
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import heavyball

C = heavyball.chainable


class Block(nn.Module):
    """Attention and a feed-forward layer, normalized before each."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, symbols: int, width: int, layers: int, context: int):
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, symbols, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("text", type=Path, nargs="?", default=Path(__file__))
    for name, value in (
        ("steps", 500),
        ("width", 96),
        ("layers", 2),
        ("context", 64),
        ("batch", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    torch.manual_seed(0)
    text = given.text.read_text("utf-8")
    symbols = sorted(set(text))
    tokens = torch.tensor([symbols.index(c) for c in text])
    model = Model(len(symbols), given.width, given.layers, given.context)
    # pass the module: embeddings and the head use AdamW and are identified by name
    opt = heavyball.Muon(
        model.named_parameters(), lr=0.02, adamw_lr=3e-3, gradient_clipping="global_norm_clip"
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        opt, max_lr=0.02, total_steps=given.steps, pct_start=0.1, cycle_momentum=False
    )
    first = None
    for step in range(1, given.steps + 1):
        starts = torch.randint(len(tokens) - given.context - 1, (given.batch,)).tolist()
        windows = torch.stack([tokens[s : s + given.context + 1] for s in starts])
        logits = model(windows[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        first = loss.item() if first is None else first
        if step % 50 == 0 or step == given.steps:
            print(f"step {step:4d}  loss {loss.item():.3f} nats per character")
    print("lower than at first:", loss.item() < first)


if __name__ == "__main__":
    main()
