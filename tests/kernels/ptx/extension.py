"""The CUDA extension as built, its launches caught and run by the machine: objects, bindings, PTX, nothing replaced
but CUDA's runtime library."""

from __future__ import annotations

import ctypes
import subprocess
import sysconfig
from collections import Counter
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import triton
from torch import Tensor

import setup_cuda
from prunevit_kernels import FusedMlp, Target
from prunevit_kernels.fused_mlp._cuda import CudaMlp, PackedWeights
from tests.kernels.cuda.emulation import Gpu

from .launch import TOGETHER, kernels_of, run
from .machine import Timing
from .memory import DeviceMemory

HERE = Path(__file__).parent
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LAUNCHED = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_void_p, ctypes.c_size_t
)


def link(folder: Path) -> Path:
    """The extension's objects and the stand-in for the runtime, as one library."""
    runtime, target = folder / "runtime.o", folder / "_cuda.so"
    subprocess.run(["g++", "-O1", "-fPIC", "-c", str(HERE / "runtime.cpp"), "-o", str(runtime)], check=True)
    bindings = setup_cuda.compile_bindings([pybind11.get_include(), sysconfig.get_path("include")])
    # symbolic: PyTorch may have loaded the real runtime, whose names would win
    options = ("-cudart", "none", "-Xlinker", "-Bsymbolic")
    setup_cuda.link(target, [bindings, *setup_cuda.compile_objects(), runtime], *options)
    return target


def ptx_of() -> dict[str, str]:
    """Each kernel's PTX, as its object carries it, by the kernel's mangled name."""
    dumps = [setup_cuda.run([str(CUOBJDUMP), "-ptx", str(built)]) for built in setup_cuda.compile_objects()]
    texts = [f".version{text}" for dump in dumps for text in dump.split(".version")[1:]]
    return {name: text for text in texts for name in kernels_of(text)}


class EmulatedExtension:
    """The extension on a GPU that is this machine."""

    def __init__(self, folder: Path) -> None:
        path = link(folder)
        loader = ExtensionFileLoader("prunevit_kernels._cuda", str(path))
        spec = spec_from_file_location("prunevit_kernels._cuda", path, loader=loader)
        assert spec is not None
        self.module: ModuleType = module_from_spec(spec)
        loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(path))
        self.ptx = ptx_of()

    def pack(self, op: FusedMlp, target: Target) -> CudaMlp:
        return CudaMlp(self.module, op, target)

    def be(self, gpu: Gpu, timing: Timing = TOGETHER) -> None:
        """The GPU that kernels are planned for and launched on from now on."""
        self.timing = timing
        self.callback = _LAUNCHED(self._launched)
        self.library.emulate_gpu(gpu.sm, gpu.multiprocessors, gpu.shared_limit, self.callback)

    def launch(self, mlp: Any, held: tuple[PackedWeights, Tensor, Tensor | None]) -> Counter[str]:
        """A bound MLP, on the memory that its launch holds. How many instructions of each kind its warps issued."""
        weights, x, workspace = held
        self.memory, self.executed = DeviceMemory(), Counter[str]()
        self.failure: BaseException | None = None
        for name, tensor in {**weights.buffers(), "x": x, "workspace": workspace}.items():
            if tensor is not None:
                self.memory.add(name, tensor, constant=name not in ("x", "workspace"))
        mlp.launch(0)
        if self.failure is not None:
            raise self.failure
        return self.executed

    def _launched(self, name: bytes, grid: Any, threads: int, arguments: int, shared_bytes: int) -> None:
        kernel = name.decode()
        text = self.ptx[kernel]
        given = ctypes.string_at(arguments, kernels_of(text)[kernel].param_bytes)
        blocks = (grid[0], grid[1], grid[2])
        try:
            self.executed += run(
                text, kernel, [given], self.memory,
                grid=blocks, threads=threads, shared_bytes=shared_bytes, timing=self.timing,
            )  # fmt: skip
        except BaseException as failure:  # C++ is between us and whoever should see it
            self.failure = self.failure or failure
