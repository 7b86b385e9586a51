"""Runs printed Triton kernels over tensors on CUDA devices, without ever waiting for the device."""

import contextlib
import hashlib
import linecache
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from heavyball.compiler.cpp.toolchain import ToolchainError
from heavyball.compiler.pipeline import Printed
from heavyball.compiler.run.table import Kernel, Table, described, entry
from heavyball.compiler.triton.printer import CHUNK, DEVICES, WARPS
from heavyball.compiler.triton.rows import Memory
from heavyball.numerics import SCALAR, lasting

ALIGNMENT = 16
# Without fusion every operation is rounded as in torch, and as written in the graph.
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": False}


def serves(device: torch.device) -> bool:
    """Whether kernels for this device are printed as Triton."""
    return device.type in DEVICES


@dataclass(eq=False)
class DeviceKernel(Kernel):
    """`run` is a list of kernels; `memory` belongs to kernels that walk row by row."""

    memory: Memory | None = None


def table(kernel: Kernel, device: torch.device) -> Table:
    """An empty table for a kernel's tensors on one device."""
    return DeviceTable(kernel, device=device) if serves(device) else Table(kernel)


def libdevice() -> Any:
    """The module of the functions that Triton does not have itself."""
    from triton.language.extra import libdevice as module

    return module


def load(source: str) -> dict[str, Any]:
    """The names that a printed module defines.

    Triton reads a kernel's source again, so it is kept where `inspect` finds it without a file.
    """
    import triton
    import triton.language as tl

    name = f"<heavyball {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    module = {"__name__": name, "triton": triton, "tl": tl, "libdevice": libdevice()}
    exec(compile(source, name, "exec"), module)
    return module


def compiled(printed: Printed) -> Kernel:
    """Load a printed kernel, and compile it for the present device.

    Errors: ToolchainError if Triton is not there, or with its complaint.
    """
    try:
        module = load(printed.source)
        passes = [module[name] for name in printed.functions]
        for run in passes:
            kinds = [torch.int64, torch.int64, *[SCALAR] * 3, torch.int32]
            run.warmup(*kinds, ALIGNED=True, grid=(1,), **OPTIONS)
    except Exception as error:  # whatever Triton's stages raise
        lines = str(error).strip().splitlines() or [""]
        raise ToolchainError(f"Triton: {type(error).__name__}: {lines[-1]}") from error
    return DeviceKernel(**described(printed), run=passes, memory=printed.memory)


class Mirror:
    """A small tensor on the device that is filled from the host, when the host's has changed."""

    def __init__(self, host: Tensor, device: torch.device):
        self.tensor = torch.empty_like(host, device=device)
        self._sent: Tensor | None = None
        # A graph that is being captured copies from this memory whenever it is replayed, and none
        # can be pinned during a capture.
        self._spare: Tensor | None = _pinned_like(host, device)
        self._captured: list[Tensor] = []

    def send(self, host: Tensor) -> bool:
        """Copy the host's tensor to the device if it changed; return whether it did."""
        capturing = _capturing(self.tensor.device)
        # A replayed graph fills the tensor behind our back: from then on it is filled every time.
        known = self._sent is not None and not capturing and not self._captured
        if known and torch.equal(host, self._sent):  # type: ignore[arg-type]
            return False
        # Memory for this copy alone: torch gives it to others only when the copy has been made.
        staging = _pinned_like(host, self.tensor.device) if not capturing else self._spare
        if capturing:
            staging = _pinned_like(host, self.tensor.device) if staging is None else staging
            self._captured.append(staging)
            self._spare = None
        elif self._spare is None:
            self._spare = _pinned_like(host, self.tensor.device)
        assert staging is not None
        self.tensor.copy_(staging.copy_(host), non_blocking=True)
        self._sent = host.clone()
        return True


def _pinned_like(host: Tensor, device: torch.device) -> Tensor:
    pinned = device.type == "cuda"
    return torch.empty(host.shape, dtype=host.dtype, device="cpu", pin_memory=pinned)


def _sent(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait for it."""
    staging = _pinned_like(host, device).copy_(host)
    return torch.empty_like(host, device=device).copy_(staging, non_blocking=True)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@dataclass(eq=False)
class DeviceTable(Table):
    """A table in the memory of a device. Its buffers do not move while it is used."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    aligned: bool = False
    arrived: Tensor | None = None
    memory: Tensor | None = None
    mirror: Mirror | None = None
    hyper: Mirror | None = None

    def finish(self) -> None:
        """Cut the tensors into chunks and make the buffers."""
        kernel, count = self.kernel, len(self.rows)
        flat = kernel.starts is None
        self.give_shares_room(self.device)
        if self.positions is not None:
            self.positions = _sent(self.positions, self.device)
        self.fixed = torch.tensor(self.rows, dtype=torch.int64, device="cpu")
        pieces = [-(-row[0] // CHUNK) for row in self.rows] if flat else self._tiles()
        chunks = [(index, part) for index, n in enumerate(pieces) for part in range(n)]
        self.mirror = Mirror(self.fixed, self.device)  # type: ignore[arg-type]
        self.chunks = _sent(torch.tensor(chunks, dtype=torch.int64, device="cpu"), self.device)
        self.scratch = torch.empty(count * kernel.values, dtype=SCALAR, device=self.device)
        self.parts = torch.empty(len(chunks) * kernel.parts, dtype=SCALAR, device=self.device)
        self.arrived = torch.zeros(count, dtype=torch.int32, device=self.device)

    def _tiles(self) -> list[int]:
        """Give each tensor its memory, and cut it into tiles."""
        memory, leading = self.kernel.memory, self.kernel.leading  # type: ignore[attr-defined]
        first = leading - len(self.kernel.starts) + 1  # type: ignore[arg-type]
        needs = [memory.of(row[0], row[first:leading]) for row in self.rows]
        size = sum(n for n, _ in needs)
        self.memory = torch.empty(size, dtype=SCALAR, device=self.device)
        places, place = [], self.memory.data_ptr()
        for n, _ in needs:
            places.append([place])
            place += n * self.memory.element_size()
        self.fixed = torch.cat([self.fixed, torch.tensor(places, device="cpu")], 1)  # type: ignore[list-item]
        return [tiles for _, tiles in needs]

    def step(self, groups: Sequence[Mapping[str, Any]], totals: Mapping[str, Tensor]) -> None:
        """Send what has changed and run every pass."""
        assert self.mirror is not None
        on_cuda = self.device.type == "cuda"
        with torch.cuda.device(self.device) if on_cuda else contextlib.nullcontext():
            if self.mirror.send(self.fixed):  # type: ignore[arg-type]
                low = self.kernel.leading
                high = low + len(self.kernel.tensors)
                addresses = self.fixed[:, low:high]  # type: ignore[index]
                self.aligned = torch.equal(addresses, addresses - addresses % ALIGNMENT)
            self._fill(groups, totals)
            for run in self.kernel.run:
                self._start(run)

    def _start(self, run: Any) -> None:
        per_tensor = run.__name__.startswith("between")
        run[(len(self.rows) if per_tensor else len(self.chunks),)](  # type: ignore[arg-type]
            self.mirror.tensor,  # type: ignore[union-attr]
            self.chunks,
            self.hyper.tensor,  # type: ignore[union-attr]
            self.scratch,
            self.parts,
            self.arrived,
            ALIGNED=self.aligned,
            **OPTIONS,
        )

    def _fill(self, groups: Sequence[Mapping[str, Any]], totals: Mapping[str, Tensor]) -> None:
        """Bring hyper-parameters and sums over all parameters to where the kernel reads them."""
        hypers, there = self.kernel.hypers, list[tuple[int, int, Tensor]]()
        rows = []
        for number, group in enumerate(groups):
            row = [0.0] * (len(hypers) + len(self.kernel.totals))
            for place, (key, index) in enumerate(hypers):
                value = group[key]
                if isinstance(value, Tensor) and serves(value.device):
                    there.append((number, place, value))
                else:
                    row[place] = entry(value, index)
            rows.append(row)
        values = torch.tensor(rows, dtype=SCALAR, device="cpu")
        if self.hyper is None:
            with lasting():
                self.hyper = Mirror(values, self.device)
        self.hyper.send(values)
        for number, place, value in there:
            self.hyper.tensor[number, place].copy_(value.detach().reshape(()), non_blocking=True)
        for place, key in enumerate(self.kernel.totals, start=len(hypers)):
            self.hyper.tensor[:, place].copy_(totals[key], non_blocking=True)
