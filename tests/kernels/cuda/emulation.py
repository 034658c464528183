"""Builds and drives the emulator: csrc/cuda's kernels, unchanged, on a CPU."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prunevit_kernels import FusedMlp
from prunevit_kernels._configs import CUDA_MLP_KERNELS as KERNELS
from prunevit_kernels.fused_mlp._cuda import PackedWeights

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
ACTS = ("gelu", "gelu_tanh", "quick_gelu", "relu")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the choice of a kernel and of its tiles depends on."""

    sm: int
    multiprocessors: int
    shared_limit: int


H100 = Gpu(90, 132, 227 * 1024)
A100 = Gpu(80, 108, 163 * 1024)
RTX_4090 = Gpu(89, 128, 99 * 1024)
ONE_SM = Gpu(90, 1, 227 * 1024)
"""Row tiles are never too few for it: the tallest ones are chosen, and nothing is split."""


def build(source: str, folder: Path) -> Path:
    """Compile one of the C++ programs beside this file with the host's compiler."""
    program = folder / source
    # fibers jump between stacks, which _FORTIFY_SOURCE's checked longjmp takes for an error
    flags = ["-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=0"]
    command = ["g++", *flags, f"-I{SOURCES}", f"-I{HERE}", str(HERE / f"{source}.cpp"), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return program


def bits(tensor: Tensor) -> np.ndarray:
    """The tensor's memory, 16-bit floats as integers."""
    tensor = tensor.contiguous().cpu()
    return (tensor.view(torch.int16) if tensor.element_size() == 2 else tensor).numpy()


def emulate(
    program: Path,
    folder: Path,
    op: FusedMlp,
    x: Tensor,
    *,
    kernel: str | None,
    gpu: Gpu,
    wide: bool = True,
    early: bool = False,
) -> tuple[Tensor, str]:
    """Run op on x [M, E], a view whose rows have a pitch. Returns x's memory afterwards, and the plan that ran.

    ``wide`` says whether the rows start on 16 bytes, as the extension would find out from the pointer; ``early``
    whether asynchronous copies land as soon, or as late, as they may.
    """
    rows, pitch = x.shape[0], x.stride(0) if x.shape[0] > 1 else x.shape[1]
    extent = (rows - 1) * pitch + x.shape[1]
    bits(x.as_strided((extent,), (1,), x.storage_offset())).tofile(folder / "x")
    for name in ("reads", "writes"):
        (folder / name).unlink(missing_ok=True)
    for name, tensor in PackedWeights(op, torch.device("cpu"), x.dtype).buffers().items():
        bits(tensor).tofile(folder / name)
    numbers = [rows, op.embed_dim, op.w1.shape[1], op.hidden_dim, op.w2.shape[0], pitch, int(wide), op.eps]
    chosen = -1 if kernel is None else KERNELS.index(kernel)
    numbers += [int(x.dtype == torch.bfloat16), ACTS.index(op.act), chosen]
    (folder / "case").write_text(" ".join(map(str, numbers)))
    command = [str(program), str(folder), *map(str, dataclasses.astuple(gpu))]
    environment = os.environ | ({"PRUNEVIT_EMULATE_EARLY": "1"} if early else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{op.embed_dim} × {op.hidden_dim}, {rows} rows, {kernel}: {done.returncode}\n{done.stderr}")
    after = torch.from_numpy(np.fromfile(folder / "x", dtype=np.int16)).view(x.dtype)
    return after, done.stdout.strip()


def draw(
    embed: int,
    hidden: int,
    *,
    act: str = "gelu",
    reads: tuple[int, ...] | None = None,
    writes: tuple[int, ...] | None = None,
    gamma: bool = False,
    biases: bool = True,
    seed: int = 0,
) -> FusedMlp:
    """An op with weights of a trained model's size, in fp32."""
    g = torch.Generator().manual_seed(seed)
    in_dim = embed if reads is None else len(reads)
    out_dim = embed if writes is None else len(writes)
    return FusedMlp(
        embed,
        torch.randn(hidden, in_dim, generator=g) / math.sqrt(in_dim),
        torch.randn(hidden, generator=g) if biases else None,
        torch.randn(out_dim, hidden, generator=g) / math.sqrt(hidden),
        torch.randn(out_dim, generator=g) if biases else None,
        act,  # type: ignore[arg-type]
        1e-6,
        torch.randn(out_dim, generator=g) if gamma else None,
        reads,
        writes,
    )
