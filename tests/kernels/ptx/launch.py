"""Runs what Triton compiled, or a kernel of a PTX module, on the machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from prunevit_kernels._launch import Call

from . import arithmetic, matrix, synchronise, transfer  # noqa: F401  the instructions, by being imported
from .machine import Block, Timing, arguments
from .memory import DeviceMemory
from .parse import Kernel, parse

TOGETHER = Timing()
"""Warps together, everything asynchronous at once."""


@cache
def kernels_of(text: str) -> dict[str, Kernel]:
    return parse(text)


def run(
    text: str,
    kernel: str,
    values: Sequence[Any],
    memory: DeviceMemory,
    *,
    grid: tuple[int, int, int],
    threads: int,
    shared_bytes: int,
    timing: Timing = TOGETHER,
) -> Counter[str]:
    """All blocks of a launch, one after another. How many instructions of each kind their warps issued."""
    made = kernels_of(text)[kernel]
    executed: Counter[str] = Counter()
    for z, y, x in np.ndindex(*grid[::-1]):
        Block(
            made, memory, arguments(made, values), (x, y, z), grid, shared_bytes, threads, timing, executed
        ).run()  # fmt: skip
    return executed


def run_triton(call: Call, memory: DeviceMemory, timing: Timing = TOGETHER) -> Counter[str]:
    """A call, compiled for the GPU of the enclosing ``compiling_for``."""
    compiled = call.compile()
    names = call.kernel.arg_names[: len(call.args)]
    signature = compiled.src.signature
    values = []
    for name, value in zip(names, call.args, strict=True):
        if signature[name] == "constexpr":  # a size of 1, compiled in
            continue
        if isinstance(value, Tensor):
            memory.add(name, value)
        values.append(value.data_ptr() if isinstance(value, Tensor) else value)
    made = kernels_of(compiled.asm["ptx"])[compiled.metadata.name]
    values += [0] * (len(made.params) - len(values))  # Triton's own scratch memory, which no kernel here asks for
    return run(
        compiled.asm["ptx"],
        compiled.metadata.name,
        values,
        memory,
        grid=call.blocks,
        threads=32 * compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        timing=timing,
    )
