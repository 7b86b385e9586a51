"""A step of shards with sums, or rounded at random: by kernels, walk by walk, beside torch's operations.

Two optimizers on the same shards step by turns, in processes that talk over gloo.
"""

import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import heavyball
from benchmarks.report import write_section

MARK = "staged"
CHAINS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    "AdamW, cautious": ("AdamW", torch.float32, {"caution": True}),
    "AdamW, global clip": ("AdamW", torch.float32, {"gradient_clipping": "global_norm_clip"}),
    "FactoredAdamW": ("FactoredAdamW", torch.float32, {}),
    "Adafactor": ("Adafactor", torch.float32, {}),
    "AdamW, bfloat16 weights": ("AdamW", torch.bfloat16, {}),
    "AdamW, 8-bit state": ("AdamW", torch.float32, {"storage_dtype": "8bit"}),
    "AdamW, cautious, bfloat16 weights": ("AdamW", torch.bfloat16, {"caution": True}),
}


class Layers(nn.Module):
    """The matrices and vectors of some layers of a decoder."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        shapes = [*4 * [(width, width)], (4 * width, width), (width, 4 * width), (width,)]
        torch.manual_seed(0)
        self.weights = nn.ParameterList(0.02 * torch.randn(s) for s in shapes * layers)


def _work(rank: int, world: int, folder: str, steps: int, width: int, layers: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    mesh, rows = init_device_mesh("cpu", (world,)), []
    for label, (name, dtype, options) in CHAINS.items():
        made = []
        for compiled in (True, False):
            model = Layers(width, layers).to(dtype)
            fully_shard(model, mesh=mesh)
            params = [*model.parameters()]
            opt = getattr(heavyball, name)(params, lr=1e-3, compile=compiled, **options)
            made.append((opt, params, list[float]()))
        for step in range(steps + 3):
            for opt, params, times in made:
                for p in params:
                    p.grad = torch.randn_like(p)
                dist.barrier()
                start = time.perf_counter()
                opt.step()
                if step >= 3:
                    times.append(1e3 * (time.perf_counter() - start))
        kernels, eager = (median(times) for *_, times in made)
        rows.append(f"| {label} | {kernels:.1f} | {eager:.1f} | {kernels / eager:.2f} |")
    if rank == 0:
        Path(folder, "rows").write_text("\n".join(rows))
    dist.barrier()
    dist.destroy_process_group()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--processes", default=2, show_default=True)
@click.option("--steps", default=20, show_default=True)
@click.option("--width", default=384, show_default=True)
@click.option("--layers", default=3, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Page to update.")
def main(processes: int, steps: int, width: int, layers: int, out: Path | None) -> None:
    """Time steps of shards that kernels take walk by walk, and the same by torch's operations."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        given = processes, folder, steps, width, layers
        torch.multiprocessing.spawn(_work, given, nprocs=processes)
        rows = Path(folder, "rows").read_text()
    elements = sum(p.numel() for p in Layers(width, layers).parameters())
    command = f"python -m benchmarks.staged --steps {steps} --width {width} --layers {layers}"
    text = f"""## Shards, walk by walk

- command: `{command} --out docs/measurements.md`
- {processes} processes on gloo with one thread each, {elements:,} elements, {steps} steps by turns
- torch {torch.__version__}, {os.cpu_count()} cores, load {load:.1f} before the run

Median milliseconds of a step on shards (FSDP2): with kernels, whose sums are completed between two
walks over the elements, and with torch operations (`compile=False`). bfloat16 weights and codes are
rounded with the random bits of a single process.

| chain | kernels | torch | ratio |
| --- | --- | --- | --- |
{rows}"""
    click.echo(text)
    if out is not None:
        write_section(out, MARK, text)


if __name__ == "__main__":
    main()
