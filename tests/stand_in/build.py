"""The stand-in's library, and the environment in which a process takes it for a GPU's driver."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pybind11

import setup_cuda

HERE = Path(__file__).parent
BUILT = setup_cuda.ROOT / "build" / "stand_in"


def _linked(target: Path, objects: list[Path], link: Callable[[Path], object]) -> Path:
    """``target``, linked unless it is newer than its objects; other processes may be reading the old one."""
    if not target.exists() or target.stat().st_mtime < max(path.stat().st_mtime for path in objects):
        making = target.with_suffix(f".{os.getpid()}.so")
        link(making)
        making.replace(target)
    return target


def compile_library() -> Path:
    """The driver and the runtime, of CUDA 13; nvcc knows where its headers are."""
    nvcc = [str(setup_cuda.find_nvcc()), "-std=c++17", "-O1", "-Xcompiler=-fPIC,-Wall,-Werror"]
    own, sources = [*HERE.glob("*.h"), HERE.parent / "kernels/ptx/registered.h"], sorted(HERE.glob("*.cpp"))
    objects = [setup_cuda.compile_once(nvcc, source, BUILT / f"{source.stem}.o", own) for source in sources]
    command = ["g++", "-shared", *map(str, objects), "-Wl,-soname,libcuda.so.1", "-ldl", "-o"]
    return _linked(BUILT / "libcuda.so.1", objects, lambda target: setup_cuda.run([*command, str(target)]))


def link_extension() -> Path:
    """The CUDA extension's own objects, which find CUDA's runtime where the process has it."""
    bindings = setup_cuda.compile_bindings([pybind11.get_include(), sysconfig.get_path("include")])
    objects = [bindings, *setup_cuda.compile_objects()]
    return _linked(BUILT / "_cuda.so", objects, lambda target: setup_cuda.link(target, objects, "-cudart", "none"))


def environment(order: int | str = "late", sm: int = 90) -> dict[str, str]:
    """What a process needs to run on the stand-in: a GPU of ``sm``, that does its work in this order."""
    library, _ = compile_library(), link_extension()
    return {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(BUILT),
        "TRITON_CACHE_DIR": str(BUILT / "triton"),  # its driver is linked with the stand-in
        "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER": "0",  # it loads machine code by itself, and no PTX
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its workers would be forks of a process that has the stand-in
        "PYTHONPATH": os.pathsep.join([str(HERE / "path"), str(setup_cuda.ROOT), os.environ.get("PYTHONPATH", "")]),
        "STAND_IN_ORDER": str(order),
        "STAND_IN_SM": str(sm),
    }
