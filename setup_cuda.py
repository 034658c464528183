"""prunevit_kernels._cuda: what nvcc compiles, for which GPUs, and how it is linked. setup.py calls this.

nvcc compiles and links everything, so that it finds its own headers and the static runtime. ``PRUNEVIT_CUDA_ARCHS``
names the GPUs: ``80;90a`` where it is not set, "" for a build without CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
BINDINGS = ROOT / "csrc" / "bindings_cuda.cpp"
OBJECTS = ROOT / "build" / "cuda"
NAME = "prunevit_kernels._cuda"
FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
ONLY_FOR = {"fused_wgmma.cu": "90a", "wgmma_gemms.cu": "90a"}


def find_nvcc() -> str | None:
    """nvcc as $CUDA_HOME, PATH or the usual place has it."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = [shutil.which("nvcc", path=f"{home}/bin") for home in homes[:-1]]
    return next(filter(None, [*found, shutil.which("nvcc"), shutil.which("nvcc", path=f"{homes[-1]}/bin")]), None)


def architectures() -> list[str]:
    return [arch for arch in os.environ.get("PRUNEVIT_CUDA_ARCHS", "80;90a").replace(",", ";").split(";") if arch]


def wanted() -> bool:
    """Whether the extension can be built here. Says why where it cannot."""
    if not architectures():
        print(f"{NAME}: not built, PRUNEVIT_CUDA_ARCHS is empty")
        return False
    if find_nvcc() is None:
        print(f"{NAME}: not built, no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
        return False
    return True


def gencodes(archs: list[str]) -> list[str]:
    """Machine code for each, and one as PTX: the driver compiles a plain one for GPUs newer than all of them.

    What is for 90a alone carries its PTX too, for tests: a machine of theirs runs what is shipped.
    """
    codes = {arch: f"sm_{arch}" for arch in archs}
    whole = next((arch for arch in archs if arch.isdigit()), archs[0])
    codes[whole] = f"[sm_{whole},compute_{whole}]"
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes.items()]


def run(command: list[str]) -> str:
    """What the command said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_once(command: list[str], source: Path, built: Path, headers: list[Path]) -> Path:
    """``built``, compiled by ``command`` unless it is from that command and newer than all that it is made of."""
    by, said = built.with_suffix(".txt"), built.with_suffix(".log")  # the command that made it, and what it said
    whole = [*command, "-c", str(source)]
    same = built.exists() and said.exists() and by.exists() and by.read_text() == " ".join(whole)
    if same and built.stat().st_mtime > max(path.stat().st_mtime for path in (source, *headers)):
        return built
    built.parent.mkdir(parents=True, exist_ok=True)
    making = built.with_suffix(f".{os.getpid()}.o")  # another build may be reading the old one
    said.write_text(run([*whole, "-o", str(making)]))
    making.replace(built)
    by.write_text(" ".join(whole))
    return built


def nvcc_command() -> list[str]:
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc is not on PATH, in CUDA_HOME or in /usr/local/cuda")
    return [nvcc, *FLAGS]


def compile_objects(folder: Path = OBJECTS) -> list[Path]:
    """Compile what has changed, as many sources at a time as there are cores."""
    command, archs = nvcc_command(), architectures()
    headers = [*SOURCES.glob("*.h"), *SOURCES.glob("*.cuh")]

    def compile_one(source: Path) -> Path:
        own = [arch for arch in archs if ONLY_FOR.get(source.name, arch) == arch]
        return compile_once([*command, *gencodes(own)], source, folder / f"{source.stem}.{'_'.join(own)}.o", headers)

    sources = [path for path in sorted(SOURCES.glob("*.cu")) if ONLY_FOR.get(path.name, archs[0]) in archs]
    with ThreadPoolExecutor(CORES) as threads:
        return list(threads.map(compile_one, sources))


def compile_bindings(includes: list[str]) -> Path:
    """The one object that names Python."""
    wgmma = ["-DPRUNEVIT_WGMMA"] if "90a" in architectures() else []
    command = [*nvcc_command(), *wgmma, *(f"-I{path}" for path in includes)]
    return compile_once(command, BINDINGS, OBJECTS / "bindings.o", list(SOURCES.glob("*.h")))


def link(target: Path, objects: list[Path], *options: str) -> None:
    """One shared library of the objects, with CUDA's static runtime unless ``options`` say otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    run([*nvcc_command(), "-shared", *(options or ("-cudart", "static")), "-o", str(target), *map(str, objects)])


def build(target: Path, includes: list[str]) -> None:
    """The extension, at ``target``. ``includes`` are Python's and pybind11's headers."""
    link(target, [compile_bindings(includes), *compile_objects()])
