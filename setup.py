"""The native extensions. Everything else about the package is in pyproject.toml.

``prunevit_kernels._cpu`` always builds: C++17 and pybind11 alone. Its kernels are compiled once for every instruction
set, and the best one is chosen when the program runs. ``prunevit_kernels._cuda`` builds where there is an nvcc:
setup_cuda.py.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))  # a build in isolation has no folder of its own on the path
import setup_cuda

CPU = Path("csrc/cpu")
# -ffp-contract=fast lets the compiler fuse multiply-adds; no other rule of floating point is bent.
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-pthread",
]
FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # gcc reports its own intrinsics headers
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
if os.environ.get("PRUNEVIT_SANITIZE"):  # `make sanitize`
    FLAGS += [*SANITIZERS, "-O1", "-g1"]
if sys.platform == "darwin":
    # a Python for two kinds of processor would compile each source for both, with flags that only one of them knows
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma"]
    ISAS |= {"avx2": avx2, "avx512": [*avx2, "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"]}


def changed(source: str) -> float:
    """When a source, a header or this file last changed."""
    return max(path.stat().st_mtime for path in (Path(source), Path(__file__), *CPU.rglob("*.h")))


class BuildExt(build_ext):
    """Compiles the kernels once for every instruction set, in parallel, and links them into their extension."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "prunevit_kernels._cpu":
            ext.extra_objects = self.compile_cpu()
        if ext.name == setup_cuda.NAME:
            setup_cuda.build(Path(self.get_ext_fullpath(ext.name)), [pybind11.get_include(), *self.include_dirs])
        else:
            super().build_extension(ext)

    def compile_cpu(self) -> list[str]:
        kernels = sorted(map(str, CPU.glob("kernels/*.cpp")))
        jobs = [
            (name, source, [*flags, f"-DPRUNEVIT_ISA={name}"]) for name, flags in ISAS.items() for source in kernels
        ]
        jobs += [("common", str(source), []) for source in sorted(CPU.glob("*.cpp"))]

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            name, source, flags = job
            folder = str(Path(self.build_temp) / name)
            (built,) = self.compiler.object_filenames([source], output_dir=folder)
            if Path(built).exists() and Path(built).stat().st_mtime > changed(source):
                return [built]
            return self.compiler.compile([source], folder, extra_postargs=[*FLAGS, *flags])

        with ThreadPoolExecutor(setup_cuda.CORES) as threads:
            return [path for paths in threads.map(compile_one, jobs) for path in paths]


def cpu_extension() -> Extension:
    return Extension(
        "prunevit_kernels._cpu",
        ["csrc/bindings_cpu.cpp"],
        include_dirs=[pybind11.get_include(), "csrc"],
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread", *(flag for flag in FLAGS if "sanitize" in flag)],
        depends=sorted(map(str, ["setup.py", *CPU.rglob("*.h"), *CPU.rglob("*.cpp")])),
        language="c++",
    )


def cuda_extensions() -> list[Extension]:
    sources = sorted(map(str, Path("csrc").rglob("*.cu")))
    return [Extension(setup_cuda.NAME, sources)] if setup_cuda.wanted() else []


setup(ext_modules=[cpu_extension(), *cuda_extensions()], cmdclass={"build_ext": BuildExt})
