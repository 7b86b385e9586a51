"""Measures the figures of fused_backward.md.

Peak memory of a step, each way in a process of its own; and what a step inside `backward()` costs each
parameter in Python, by turns with the ordinary step in one process.
"""

import os
import resource
import subprocess
import sys
import time

import torch

import heavyball

LAYERS, WIDTH, BATCH = 48, 1024, 16
MIB = 2**20
WAYS = {
    "ordinary step": {},
    "ordinary step, eager": {"compile": False},
    "fused backward": {"fuse_backward": True},
    "fused backward, eager": {"fuse_backward": True, "compile": False},
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(way: str, layers: int, width: int) -> heavyball.AdamW:
    """Three steps of a deep network."""
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, False) for _ in range(layers)))
    opt = heavyball.AdamW(model.parameters(), **WAYS[way])
    for _ in range(3):
        opt.zero_grad()
        model(torch.ones(BATCH, width)).square().mean().backward()
        opt.step()
    return opt


def measure(way: str) -> None:
    """Print the peak of the process before training, and after three steps, in MiB."""
    torch.set_num_threads(1)
    train(way, layers=2, width=64)  # loads all code
    before = peak_bytes()
    opt = train(way, LAYERS, WIDTH)
    print(f"{before / MIB:.0f} {peak_bytes() / MIB:.0f} {opt.state_bytes() / MIB:.0f}")


def overhead(count: int = 300, size: int = 64) -> dict[str, float]:
    """Microseconds of backward and step for each of many small parameters, at best."""
    torch.set_num_threads(1)
    best: dict[str, float] = {}
    opts = {
        name: heavyball.AdamW([torch.nn.Parameter(torch.randn(size)) for _ in range(count)], **way)
        for name, way in WAYS.items()
        if "compile" not in way
    }
    for turn in range(20):
        for name, opt in opts.items():
            opt.param_groups[0]["lr"] = 1e-3 / (1 + turn)
            loss = sum(p.sum() for p in opt.param_groups[0]["params"])
            opt.zero_grad()
            start = time.perf_counter()
            loss.backward()
            opt.step()
            taken = (time.perf_counter() - start) * 1e6 / count
            best[name] = min(best.get(name, taken), taken)
    return best


def main() -> None:
    if len(sys.argv) > 1:
        measure(sys.argv[1])
        return
    size = 4 * LAYERS * WIDTH * WIDTH / MIB
    print(f"{LAYERS} layers of {WIDTH} x {WIDTH}: parameters {size:.0f} MiB, gradients as much\n")
    print("| way | peak, MiB | parameters and state | the rest |")
    print("| --- | --- | --- | --- |")
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, __file__, way],
            capture_output=True,
            text=True,
            check=True,
            # memory that is freed goes back to the system at once, so the peak is that of tensors
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)},
        )
        before, after, state = map(int, done.stdout.split())
        peak, held = after - before, round(size) + state
        print(f"| {way} | {peak} | {held} | {peak - held} |")
    print("\nmicroseconds of backward and step for each of 300 parameters of 64 elements:")
    for way, taken in overhead().items():
        print(f"  {way}: {taken:.1f}")


if __name__ == "__main__":
    main()
