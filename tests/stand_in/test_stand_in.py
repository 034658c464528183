"""GPU tests, where there is no GPU: PyTorch's streams, graphs and allocator, Triton's launcher and the CUDA extension,
all of them as they are, on a GPU that the PTX machine stands in for."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import setup_cuda
from tests.kernels.ptx.memory import Fault

from .build import environment
from .memory import Memory

pytestmark = pytest.mark.timeout(1200)  # several tests in one, the first of them compile

ORDERS = ["late", "early", "7"]
RUNTIME = "tests/runtime/test_on_gpu.py"


@pytest.fixture(autouse=True)
def needed() -> None:
    if torch.version.cuda is None:
        pytest.skip("this PyTorch was built without CUDA: it has no GPU code to run")
    if setup_cuda.find_nvcc() is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: there is no extension to run")


def run(order: str, *arguments: str) -> None:
    pytest_ = [sys.executable, "-m", "pytest", "-p", "tests.stand_in.plugin", "-p", "no:cacheprovider", "--timeout=900"]
    done = subprocess.run(
        [*pytest_, "-m", "gpu", *arguments],
        env=environment(order),
        cwd=setup_cuda.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize("order", ORDERS)
def test_does_what_a_gpu_may_do(order: str) -> None:
    run(order, "tests/stand_in/check_streams.py")


@pytest.mark.parametrize("order", ORDERS)
def test_the_engine(order: str) -> None:
    """Between streams and threads; once, with each kernel that an MLP may have."""
    run(order, "tests/stand_in/check_engine.py", *([] if order == "late" else ["-k", "streams"]))


def test_whole_models() -> None:
    """Compiled, packed, run step by step, recorded and replayed; graphs that come and go; what a capture forbids."""
    exact = "computes and bf16 and (partial_writes or heads_at_the_end or distilled or attention_pool-)"
    overlap = "overlap and (partial_writes or cascade)"
    names = f"({exact}) or come_and_go or allocates or warm_runtime or else or looked_for or {overlap}"
    run("late", RUNTIME, "-k", names)


def test_kernels() -> None:
    """Triton's, by its launcher; the extension's five, as they are chosen and as graphs."""
    run("late", "tests/kernels/gpu", "-k", "captured_without and bf16 and (mixed or 21 or fuses)")
    run(
        "late",
        "tests/kernels/cuda/test_on_gpu.py",
        "-k",
        "any_number and bf16 and (1- or 33-) or not_a_number and fp16",
    )


class OneAllocation:
    """The stand-in's library, as far as its memory asks it."""

    def __init__(self, data: np.ndarray) -> None:
        self.base, self.size = data.ctypes.data, data.nbytes

    def stand_in_allocation(self, address: ctypes.c_size_t, base: Any, size: Any) -> bool:
        base._obj.value, size._obj.value = self.base, self.size
        return self.base <= address.value < self.base + self.size


def test_what_the_launch_ahead_writes_may_not_be_read_early() -> None:
    data = np.zeros(64, np.uint8)
    memory = Memory(OneAllocation(data))  # type: ignore[arg-type]
    first, second = (data.ctypes.data + np.array([at], np.uint64) for at in (0, 32))
    memory.launch("writes", lambda: memory.write(first, np.array([7], np.uint32)))
    for _ in range(2):  # as it ran, and as it is replayed
        assert memory.before_waiting().read(second, "u4") == 0
        with pytest.raises(Fault, match=r"the launch ahead writes what is read before griddepcontrol\.wait"):
            memory.before_waiting().read(first, "u4")
        with pytest.raises(Fault, match=r"is written before griddepcontrol\.wait"):
            memory.before_waiting().write(second, np.array([1], np.uint32))
        memory.launch("writes", lambda: pytest.fail("it has run before"))
    memory.launch("reads", lambda: memory.read(first, "u4"))
    assert memory.before_waiting().read(first, "u4") == 7


def test_a_fault_of_the_gpu_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "beyond.py"
    script.write_text(BEYOND)
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        cwd=setup_cuda.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "ones, block (0, 0, 0): st.global.b32" in done.stderr
    assert "an illegal memory access was encountered" in done.stderr


BEYOND = """
import torch, triton, triton.language as tl

@triton.jit
def ones(x, n: tl.constexpr):
    tl.store(x + tl.arange(0, n), 1.0)

x = torch.zeros(64, device="cuda")
ones[(1,)](x, 128)
torch.cuda.synchronize()
"""
