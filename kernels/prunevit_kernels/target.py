"""Where an op runs: a backend, a device, a dtype."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ._expect import expect
from .units import round_up

if TYPE_CHECKING:
    from .tuning import Tuning

BackendName = Literal["torch", "cpu", "cuda"]
BACKENDS: tuple[BackendName, ...] = ("torch", "cpu", "cuda")

HALF = (torch.float16, torch.bfloat16)
PDL_VARIABLE = "PRUNEVIT_PDL"
BUILD_COMMAND = "python setup.py build_ext --inplace"

Launch = Callable[[], None]


class MissingExtension(RuntimeError):
    """A native extension that this backend needs is not built. The message has the command that builds it."""


def available_cores() -> int:
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Target:
    """A backend with the device and dtype that it runs in.

    ``torch``: the reference ops, any device and floating dtype. ``cpu``: the C++ kernels, fp32, on ``threads``
    threads of their own. ``cuda``: Triton and CUDA kernels, fp16 or bf16, sm_80 and newer, with tile sizes from
    ``tuning`` where it has them.
    """

    backend: BackendName
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int = field(default_factory=available_cores)
    tuning: Tuning | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        expect(self.backend in BACKENDS, "a backend", got=self.backend, want=BACKENDS)
        expect(self.threads >= 1, "at least one thread", got=self.threads)
        if self.backend == "cpu":
            expect(self.device.type == "cpu", "the cpu backend on a CPU", got=self.device)
            expect(self.dtype == torch.float32, "the cpu backend in fp32", got=self.dtype)
        if self.backend == "cuda":
            expect(self.device.type == "cuda", "the cuda backend on a GPU", got=self.device)
            expect(self.dtype in HALF, "the cuda backend in fp16 or bf16", got=self.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without its threads: a copy starts its own."""
        return {name: value for name, value in self.__dict__.items() if name != "pool"}

    @property
    def alignment(self) -> int:
        """Columns between the starts of slices in a packed row: 16-byte copies on a GPU, no padding elsewhere."""
        return 8 if self.backend == "cuda" else 1

    @property
    def pool(self) -> Any:
        """The threads of the cpu backend. Whatever is packed for one Target object shares them and takes turns."""
        from .cpu import new_pool  # the extension is loaded only by who runs on it

        # no cached_property: of two threads that come first, each could have a pool of its own
        return self.__dict__.get("pool") or self.__dict__.setdefault("pool", new_pool(self.threads))

    @cached_property
    def overlaps(self) -> bool:
        """Whether a launch may begin before the one ahead of it has ended, where ``PRUNEVIT_PDL=1`` asks for it.

        CUDA calls it programmatic dependent launch: blocks are placed, and what they need not wait for is done, while
        the last blocks of the launch ahead still run. GPUs of sm_90 and newer have it.
        """
        asked = os.environ.get(PDL_VARIABLE, "0")
        expect(asked in ("0", "1"), f"0 or 1 in {PDL_VARIABLE}", got=asked)
        if asked == "0" or self.backend != "cuda":
            return False
        capability = torch.cuda.get_device_capability(self.device)
        expect(capability >= (9, 0), f"a GPU of sm_90 or newer for {PDL_VARIABLE}=1", got=capability)
        return True

    def pitch(self, width: int) -> int:
        """Elements from one row of a buffer to the next: a multiple of 8 on a GPU, of a cache line on a CPU."""
        unit = {"torch": 1, "cpu": 16, "cuda": 8}[self.backend]
        return round_up(width, unit)


@cache
def cpu_extension_built() -> bool:
    """Are the C++ kernels there?"""
    return find_spec("prunevit_kernels._cpu") is not None


def kernel_backend(device: torch.device, dtype: torch.dtype) -> BackendName:
    """The backend whose kernels serve a device and dtype; ``torch``, the reference ops, where none does."""
    if device.type == "cuda" and dtype in HALF:
        return "cuda"
    if device.type == "cpu" and dtype == torch.float32 and cpu_extension_built():
        return "cpu"
    return "torch"


def in_order(launches: Sequence[Launch]) -> Launch:
    """One launch that runs all of them."""

    def run() -> None:
        for launch in launches:
            launch()

    return run


class PackedOp(Protocol):
    """An op whose weights lie in the layout that one target's kernel reads."""

    @property
    def bind(self) -> Callable[..., Launch]:
        """Check the op's buffers once; what comes back runs the op on them, allocates nothing and checks nothing."""
        ...


@runtime_checkable
class Rebindable(PackedOp, Protocol):
    """A packed op whose first buffer may be another at each launch, at no more than the cost of a call."""

    def rebindable(self, first: Tensor, *rest: Tensor) -> Callable[[Tensor], Launch]:
        """Check the buffers once; then bind any other of the same shape, dtype and layout as ``first``."""
        ...
