"""What this machine can do at most, measured: the rate of multiply-adds, and bytes a second from memory and cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from prunevit_kernels import Target
from prunevit_kernels.cpu import extension
from prunevit_kernels.target import cpu_extension_built

CYCLES = 10_000_000  # of a GPU's clock that a wait takes, which tells the clock: some 5 ms
CACHED, FROM_MEMORY = 2**18, 2**26  # bytes a thread that an L2 cache holds, bytes in all that no cache does


@dataclass(frozen=True)
class Peaks:
    """``flops`` FLOP/s (two a multiply-add), ``memory`` and ``cache`` bytes/s, exponentials a second; None: no probe.

    ``flops`` is the best of the probe's samples, since a peak is a most; ``calm`` is their median as a share of it:
    far below one on a machine that was busy with something else.
    """

    flops: float
    calm: float
    memory: float
    cache: float | None
    probe: str
    exps: float | None = None


class PeakProbe:
    """Measures a target's peaks a moment at a time, so that they can be taken between the steps of what is timed."""

    def __init__(self, target: Target) -> None:
        self.target = target
        native = target.device.type == "cpu" and cpu_extension_built()
        self.native: Any = extension() if native else None
        self.flops: list[float] = []
        self._sized = 8192 if target.device.type == "cuda" else 512
        self._factor: torch.Tensor | None = None

    def sample(self) -> float:
        """One measurement of the multiply-add rate, FLOP/s."""
        rate = self.native.fma_peak(self.target.threads, 8) if self.native is not None else self._matmul()
        self.flops.append(float(rate))
        return float(rate)

    def result(self) -> Peaks:
        """What was found; bandwidths are measured now."""
        flops = max(self.flops)
        calm = statistics.median(self.flops) / flops
        if self.native is not None:
            probe = f"{self.target.threads} threads of multiply-adds in registers, {self.native.isa()}"
            return Peaks(flops, calm, *self._bandwidths(), probe)
        probe = f"a {self._sized} × {self._sized} matrix product in PyTorch"
        return Peaks(flops, calm, self._copy(), None, probe, self._exponentials())

    def _bandwidths(self) -> tuple[float, float | None]:
        """From memory and from cache: the best of three, as the peak is the best of its samples."""
        threads, read = self.target.threads, self.native.bandwidth
        memory = max(read(threads, FROM_MEMORY, 10) for _ in range(3))
        cache = max(read(threads, CACHED * threads, 10) for _ in range(3))
        # a cache slower than memory is a probe that was interrupted, not a fact about the machine
        return memory, cache if cache > memory else None

    def _matmul(self) -> float:
        size, device = self._sized, self.target.device
        if self._factor is None:  # random: a GPU multiplies constants faster
            self._factor = torch.randn(size, size, device=device).to(self.target.dtype)
        a, out = self._factor, torch.empty_like(self._factor)
        return 2 * size**3 / self._seconds(lambda: torch.mm(a, a, out=out))

    def _copy(self) -> float:
        """A copy that no cache holds, not even a GPU's."""
        on_gpu = self.target.device.type == "cuda"
        a = torch.ones(FROM_MEMORY * (16 if on_gpu else 1) // 4, device=self.target.device)
        out = torch.empty_like(a)
        return 2 * a.nbytes / min(self._seconds(lambda: out.copy_(a)) for _ in range(3))

    def _exponentials(self) -> float | None:
        """16 a clock and multiprocessor, at the clock that the product has just run at."""
        if self.target.device.type != "cuda":
            return None
        self._matmul()
        clock = CYCLES / self._seconds(lambda: torch.cuda._sleep(CYCLES))  # type: ignore[no-untyped-call]
        properties = torch.cuda.get_device_properties(self.target.device)
        return 16 * int(properties.multi_processor_count) * clock

    def _seconds(self, call: Callable[[], object]) -> float:
        call()
        self.wait()
        if self.target.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            call()
            last.record()
            self.wait()
            return float(first.elapsed_time(last)) / 1e3
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Return when all that was launched on a GPU has ended."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
