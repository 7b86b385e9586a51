"""The next character of a text, by a small GPT."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heavyball.errors import RaceError
from heavyball.race.tasks.base import Task, order_generator
from heavyball.race.tasks.files import Remote, content, fetch

FILE = "tinyshakespeare.txt"
REMOTE = Remote(
    FILE,
    (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://raw.githubusercontent.com/karpathy/ng-video-lecture/master/input.txt",
    ),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 2
TEST_WINDOWS = 256
LEAST = 10 * (CONTEXT + 1)  # characters, so that the test part holds one window


class Chars(Task):
    """A GPT of two layers that reads 64 characters.

    Split: the last tenth of the text is the test part; at most 256 evenly spaced windows of it are
    read. The loss is in nats per character, the accuracy that of the most likely next character.
    An epoch is as many batches as hold the characters of the training part.
    """

    name = "chars"
    summary = "small GPT on the characters of a text, tiny Shakespeare if none is given"
    needs_data = True
    target_on = "loss"
    target = 2.0
    batch_size = 32
    steps = 1500

    def __init__(self, data: Path | None) -> None:
        raw = content(_file(data))
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RaceError(f"the text is not UTF-8: {error}") from None
        if len(text) < LEAST:
            raise RaceError(f"the text has {len(text)} characters, at least {LEAST} are needed")
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.alphabet = sorted(set(text))
        index = {c: i for i, c in enumerate(self.alphabet)}
        codes = torch.tensor([index[c] for c in text], dtype=torch.int64)
        cut = len(codes) * 9 // 10
        self.train, test = codes[:cut], codes[cut:]
        count = min(TEST_WINDOWS, (len(test) - 1) // CONTEXT)
        starts = torch.linspace(0, len(test) - CONTEXT - 1, count, dtype=torch.float64).long()
        self.test = test[starts[:, None] + torch.arange(CONTEXT + 1)]

    def facts(self) -> dict[str, Any]:
        return {
            "train_examples": len(self.train),
            "test_examples": self.test[:, 1:].numel(),
            "alphabet": len(self.alphabet),
            "sha256": self.sha256,
        }

    def model(self, seed: int) -> nn.Module:
        return Gpt(len(self.alphabet))

    def batches(self, seed: int, batch_size: int) -> Iterator[Tensor]:
        """Windows that start anywhere in the training part. Shapes: (batch, context + 1)."""
        generator = order_generator(seed)
        window = torch.arange(CONTEXT + 1)
        while True:
            last = len(self.train) - CONTEXT
            starts = torch.randint(last, (batch_size, 1), generator=generator)
            yield self.train[starts + window]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        loss, correct = 0.0, 0
        for batch in self.test.split(64):
            logits, following = model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()
            loss += F.cross_entropy(logits, following, reduction="sum").item()
            correct += int((logits.argmax(1) == following).sum())
        characters = self.test[:, 1:].numel()
        return loss / characters, correct / characters

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-len(self.train) // (batch_size * CONTEXT))


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each after a LayerNorm, with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp_norm = nn.LayerNorm(WIDTH)
        self.mlp_in = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp_out = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.query_key_value(self.attention_norm(x))
        heads = projected.unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))


class Gpt(nn.Module):
    """Token and position embeddings, blocks, and a linear head. (batch, time) -> logits."""

    def __init__(self, alphabet: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(alphabet, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, alphabet, bias=False)
        for weight in (p for p in self.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        return self.head(self.norm(self.blocks(self.tokens(codes) + self.positions(places))))


def _file(data: Path | None) -> Path:
    if data is None:
        return fetch(REMOTE)
    if data.is_file():
        return data
    for path in (data / FILE, data / "text" / FILE):
        if path.is_file():
            return path
    raise RaceError(
        f"neither {data} nor its folder text holds {FILE}; --data takes a .txt file too"
    )
