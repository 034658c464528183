"""A GPU for a process that has loaded the stand-in's library: its kernels are run by the PTX machine.

Import it before anything asks PyTorch for a GPU.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
import traceback
from collections.abc import Callable
from functools import cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from triton import knobs

from tests.kernels.cuda.emulation import A100, H100
from tests.kernels.ptx.extension import ptx_of
from tests.kernels.ptx.launch import kernels_of, run

from .build import link_extension
from .memory import Memory

_LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
)
_RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)
ORDERS = {"late": -1, "early": -2}
LATE = os.environ.get("STAND_IN_ORDER") == "late"
DRAWN = os.environ.get("STAND_IN_ORDER") not in ORDERS


class StandIn:
    """What the library asks of Python: which work a launch is, and to do it."""

    def __init__(self) -> None:
        gpu = {80: A100, 90: H100}[int(os.environ["STAND_IN_SM"])]
        order = os.environ["STAND_IN_ORDER"]
        self.library = ctypes.CDLL("libcuda.so.1")
        self.memory = Memory(self.library)
        self.works: dict[int, Callable[[], object]] = {}
        self.numbers = itertools.count()
        self.loaded: dict[int | None, str] = {}
        """The PTX of what Triton has loaded, by the driver's handle."""
        self.failure: BaseException | None = None
        self._callbacks = _LAUNCHED(self._launched), _RUN(self._run)
        self.library.stand_in_be(
            gpu.sm, gpu.multiprocessors, gpu.shared_limit, int(ORDERS.get(order, order)), *self._callbacks
        )
        knobs.runtime.kernel_load_end_hook.add(self._kernel_loaded)

    def enqueue(self, work: Callable[[], object], stream: int) -> None:
        """Work of any kind, in the order of a stream; part of a graph where the stream is being captured."""
        error = self.library.stand_in_enqueue(ctypes.c_void_p(stream), self._number(work))
        self.raise_for(error)

    def synchronise(self, stream: int) -> None:
        self.raise_for(self.library.cudaStreamSynchronize(ctypes.c_void_p(stream)))

    def raise_for(self, error: int) -> None:
        if self.failure is not None:
            raise RuntimeError("work on the GPU failed") from self.failure
        if error:
            raise RuntimeError(f"CUDA error {error} of the stand-in")

    def _number(self, work: Callable[[], object]) -> int:
        number = next(self.numbers)
        self.works[number] = work
        return number

    def _run(self, number: int) -> int:
        try:
            self.works[number]()
        except BaseException as failure:  # C++ is between us and whoever should see it
            traceback.print_exc()
            self.failure = self.failure or failure
            return 0
        return 1

    def _launched(self, name: bytes, handle: int | None, grid: Any, threads: int, given: Any, shared: int) -> int:
        kernel = name.decode()
        if "spin_kernel" in kernel:  # torch.cuda._sleep: it only takes time
            return self._number(lambda: None)
        text = self.loaded[handle] if handle in self.loaded else shipped().get(kernel)
        if text is None:
            print(f"the stand-in has no PTX of {kernel}")
            return -1
        values = [ctypes.string_at(given[i], param.size) for i, param in enumerate(kernels_of(text)[kernel].params)]
        blocks = (grid[0], grid[1], grid[2])
        key = (text, kernel, blocks, threads, *values)

        def launch() -> None:
            run(
                text, kernel, values, self.memory,
                grid=blocks, threads=threads, shared_bytes=shared,
            )  # fmt: skip

        return self._number(lambda: self.memory.launch(key, launch))

    def _kernel_loaded(self, module: int, function: int, name: str, files: dict[str, str], key: str) -> None:
        self.loaded[function] = Path(files[f"{name}.ptx"]).read_text()


@cache
def shipped() -> dict[str, str]:
    """The PTX of the CUDA extension's kernels."""
    return ptx_of()


def load_extension() -> None:
    """Put the extension as linked for the stand-in in place of the one that has CUDA's runtime in it."""
    name = "prunevit_kernels._cuda"
    loader = ExtensionFileLoader(name, str(link_extension()))
    spec = spec_from_file_location(name, loader.path, loader=loader)
    assert spec is not None
    sys.modules[name] = module_from_spec(spec)
    loader.exec_module(sys.modules[name])
