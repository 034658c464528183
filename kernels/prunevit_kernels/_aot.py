"""Compile the Triton kernels for a GPU that is not there, and read what the compiler made.

A stand-in for Triton's driver answers only which GPU it is. Calls then compile through the very path that a launch
takes, so every specialisation (16-byte alignment of pointers first of all) is the one of the run time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas

from ._expect import expect
from ._launch import Call
from .target import Target


class _AbsentGpu:
    """What JIT compilation asks of a driver, and nothing that a launch would."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # compiled kernels are kept per device: one index an architecture

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def compiling_for(capability: int, dtype: torch.dtype, overlaps: bool = False) -> Iterator[Target]:
    """Within, calls compile for sm_80, sm_90 …. The target that is given packs ops on the CPU for them."""
    expect(not triton.knobs.runtime.interpret, "a process without TRITON_INTERPRET", got="TRITON_INTERPRET=1")
    driver: Any = triton.runtime.driver
    before = driver._active
    driver.set_active(_AbsentGpu(capability))
    try:
        yield stand_in_target(dtype, overlaps)
    finally:
        driver._active = before


def stand_in_target(dtype: torch.dtype, overlaps: bool = False) -> Target:
    """A ``cuda`` target whose tensors are on the CPU, for the interpreter and for compiling: Target refuses one."""
    target = object.__new__(Target)
    fields = {"backend": "cuda", "device": torch.device("cpu"), "dtype": dtype, "threads": 1, "tuning": None}
    for name, value in (fields | {"overlaps": overlaps}).items():
        object.__setattr__(target, name, value)
    return target


@dataclass(frozen=True)
class Build:
    """What the compiler made of one call."""

    name: str
    registers: int
    spilled: int
    stack: int
    shared: int
    tensor_core: int
    """Matrix instructions in the SASS: HMMA (mma.sync) or HGMMA (wgmma)."""
    wgmma: int
    async_copies: int
    """16-byte copies from device to shared memory that do not pass through registers."""
    narrow_copies: int
    wide_loads: int
    """16-byte loads from device memory into registers."""
    instructions: int
    """In the SASS: what a warp issues, where there is one class and no loop."""
    threads: int
    serialised: bool = False
    """ptxas lets each wgmma wait for the one before: their registers are touched in between."""
    step: int = 0
    """Instructions of the longest innermost loop, as the SASS has them."""
    exposed: int = 0
    """What waits for a load ahead of the first copy, and 16-byte loads behind the loop: nothing hides their latency."""


def build(call: Call) -> Build:
    compiled = call.compile()
    sass = _disassemble(compiled.asm["cubin"])
    usage = _resource_usage(compiled.asm["cubin"])
    wgmma = len(re.findall(r"\bHGMMA\b", sass))
    copies = re.findall(r"\bLDGSTS\.\S*", sass)
    ahead, step, behind = _around_the_longest_loop(sass)
    before_copies = re.split(r"\bLDGSTS\b", "\n".join(ahead))[0]
    return Build(
        name=compiled.metadata.name,
        registers=usage["REG"],
        spilled=len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        stack=usage["STACK"],
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r"\bH[GM]MMA\b|\bHMMA\b", sass)),
        wgmma=wgmma,
        async_copies=sum(".128" in copy for copy in copies),
        narrow_copies=sum(".128" not in copy for copy in copies),
        wide_loads=len(re.findall(r"\bLDG\.\S*\b128\b", sass)),
        instructions=len(re.findall(r"/\*[0-9a-f]{4,}\*/ +(?!NOP\b)\S", sass)),
        threads=32 * call.tile.warps,
        serialised=wgmma > 0 and "are serialized" in _assembler_remarks(compiled.asm["ptx"]),
        step=len(step),
        exposed=len(re.findall(r"\b(?:STS|SHFL)\b", before_copies))
        + len(re.findall(r"\bLDG\.\S*128\b", "\n".join(behind))),
    )


def _around_the_longest_loop(sass: str) -> tuple[list[str], list[str], list[str]]:
    """The instructions ahead of, in and behind the longest of the loops that have none within."""
    listed = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass) if text != "NOP"]
    jumps = ((at, re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)) for at, text in listed)
    loops = [(int(to[1], 16), at) for at, to in jumps if to and int(to[1], 16) < at]
    inner = [loop for loop in loops if not any(loop[0] <= o[0] and o[1] <= loop[1] for o in loops if o != loop)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0], default=(0, -1))
    ahead, behind = ([text for at, text in listed if at < start], [text for at, text in listed if at > end])
    return ahead, [text for at, text in listed if start <= at <= end], behind


def _tool(name: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    expect(path.exists(), f"{name} in triton's wheel", got=path)
    return str(path)


def _on_cubin(cubin: bytes, *command: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([*command, file.name], check=True, capture_output=True, text=True).stdout


def _assembler_remarks(ptx: str) -> str:
    """What ptxas has to say: Triton keeps it to itself."""
    target = re.search(r"\.target\s+(sm_(\d+)\w*)", ptx)
    assert target is not None
    assembler = get_ptxas(int(target[2])).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [assembler, f"-arch={target[1]}", "-v", str(source), "-o", str(Path(folder) / "kernel.cubin")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _disassemble(cubin: bytes) -> str:
    return _on_cubin(cubin, _tool("cuobjdump"), "-sass")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    text = _on_cubin(cubin, _tool("cuobjdump"), "-res-usage")
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
