"""What matrix methods cost on many GPUs, from shapes alone.

Owners, layouts, bytes of state and the dtypes in which matrices travel are the library's own; only the
speeds of a GPU and of its links are assumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import nn

import heavyball
from benchmarks.report import write_section
from heavyball.distributed.memory import bytes_on, parts_on
from heavyball.distributed.parts import Part
from heavyball.numerics import compute_dtype

MARK = "sharding"
# Products of a GPU in a second, and bytes that it sends in one.
PRODUCTS, LINK = 4e14, 5e10
# Steps of Newton-Schulz.
STEPS = 5
GPUS = (8, 64, 512, 4096)


@dataclass(frozen=True)
class Llama:
    """The shapes of a decoder."""

    name: str
    layers: int
    width: int
    inner: int
    key_width: int
    vocabulary: int = 32000

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Matrices without memory, by their names."""
        w, k = self.width, self.key_width
        shapes = {"q": (w, w), "k": (k, w), "v": (k, w), "o": (w, w)}
        shapes |= {"gate": (self.inner, w), "up": (self.inner, w), "down": (w, self.inner)}
        for layer in range(self.layers):
            for name, shape in shapes.items():
                yield f"{layer}.{name}", nn.Parameter(torch.empty(shape, device="meta"))


MODELS = (Llama("7B", 32, 4096, 11008, 4096), Llama("70B", 80, 8192, 28672, 1024))


def products(shape: tuple[int, ...]) -> float:
    """The operations of Newton-Schulz on a matrix."""
    low, high = min(shape), max(shape)
    return STEPS * (4 * low * low * high + 2 * low**3)


@dataclass(frozen=True)
class Cost:
    """What a step costs the GPU that has the most to do."""

    seconds: float
    balance: float
    sent: float

    @property
    def exchange(self) -> float:
        return self.sent / LINK


def travelling(part: Part) -> float:
    """The mean bytes of an element of a matrix on its way to the owner and back, on GPUs."""
    assert part.step is not None
    dtype = compute_dtype(part.here.dtype)
    narrow = part.step.rounded(dtype, torch.device("cuda"))
    sizes = [narrow.get(index, dtype).itemsize for index in (*part.step.there, *part.step.back)]
    assert len(sizes) == 2  # the update there, and what is made of it back
    return sum(sizes) / 2


def owned(parts: list[Part], count: int) -> Cost:
    """Ours: an owner for each matrix, whose pieces travel there and back."""
    loads = [0.0] * count
    for part in parts:
        loads[part.owner] += products(part.layout.shape)
    total = sum(part.shape.numel() * travelling(part) for part in parts)
    sent = 2 * total * (count - 1) / count**2
    return Cost(max(loads) / PRODUCTS, max(loads) * count / sum(loads), sent)


def gathered(parts: list[Part], count: int) -> Cost:
    """All-gather everywhere: each GPU has all matrices and does all of the work."""
    work = sum(products(part.layout.shape) for part in parts)
    total = sum(part.shape.numel() * travelling(part) for part in parts)
    return Cost(work / PRODUCTS, 1.0, total * (count - 1) / count)


def batched(parts: list[Part], count: int) -> Cost:
    """Dion's distributed Muon: matrices of one shape go round the GPUs, in batches filled up to them."""
    shapes: dict[tuple[int, ...], int] = {}
    for part in parts:
        shapes[part.layout.shape] = shapes.get(part.layout.shape, 0) + 1
    rounds = {shape: -(-n // count) for shape, n in shapes.items()}
    load = sum(n * products(shape) for shape, n in rounds.items())
    mean = sum(n * products(shape) for shape, n in shapes.items()) / count
    filled = sum(n * count * torch.Size(s).numel() for s, n in rounds.items())
    sent = 2 * filled * travelling(parts[0]) * (count - 1) / count**2
    return Cost(load / PRODUCTS, load / mean, sent)


def rows(model: Llama, products: str) -> Iterator[str]:
    """The lines of the table for one model."""
    params = list(model.parameters())
    soap = heavyball.SOAP(params, lr=1e-3)
    muon = heavyball.Muon(params, lr=1e-3, products=products)
    for count in GPUS:
        parts = parts_on(count, muon.registry.places(), muon.registry.programs(), False)
        places = soap.registry.places(), soap.registry.programs()
        state = [max(bytes_on(p)) / 2**30 for p in (parts, parts_on(count, *places, False))]
        cells = [f"{model.name}", f"{count:,}"]
        for cost in (owned(parts, count), batched(parts, count), gathered(parts, count)):
            milli = (1e3 * cost.seconds, 1e3 * cost.exchange)
            cells.append(f"{milli[0]:,.1f} / {milli[1]:,.1f} / {cost.balance:.2f}")
        yield " | ".join(["", *cells, *(f"{gib:,.2f}" for gib in state), ""]).strip()


def table(products: str) -> str:
    """The table in Markdown, for matrices that are multiplied so."""
    head = (
        "| model | GPUs | owners | batches of one shape, padded | all-gather everywhere "
        "| state of Muon, GiB | of SOAP |"
    )
    said = (
        f"Milliseconds of products / milliseconds of exchange / max over mean, of the GPU with the most "
        f"to do; {PRODUCTS:.0e} operations and {LINK:.0e} bytes a second are assumed, {STEPS} steps of "
        f"Newton-Schulz with products={products!r}, in which matrices travel, parameters in float32; "
        "state is that of the GPU that holds most."
    )
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for model in MODELS:
        lines += rows(model, products)
    return "\n".join([*lines, "", said])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--products",
    type=click.Choice(["bfloat16", "full"]),
    default="bfloat16",
    show_default=True,
    help="Muon's option; bfloat16 is what GPUs that multiply it faster take by themselves.",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Page to update.")
def main(products: str, out: Path | None) -> None:
    """Reckon what Muon and SOAP cost on many GPUs."""
    text = table(products)
    click.echo(text)
    if out is not None:
        write_section(out, MARK, text)


if __name__ == "__main__":
    main()
