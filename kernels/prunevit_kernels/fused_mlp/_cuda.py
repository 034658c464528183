"""fused_mlp in CUDA C++: the hidden activations never reach device memory where a single kernel serves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._configs import CUDA_MLP_KERNELS, MLP_KERNELS, Problem
from .._expect import ContractError, expect, matrix_of
from ..op import SHAPES
from ..target import BUILD_COMMAND, Launch, PackedOp, Target
from ..units import dtype_name, round_up
from . import FusedMlp

PANEL = 64  # columns of a panel, and of a chunk of the hidden width: csrc/cuda/layout.h
UNIT = 16
KERNEL_VARIABLE = "PRUNEVIT_MLP_KERNEL"


def swizzled(panels: Tensor) -> Tensor:
    """[..., rows, 64] with the eight pieces of eight columns of row r where ``piece ^ r % 8`` says."""
    *outer, rows, _ = panels.shape
    pieces = torch.arange(8, device=panels.device) ^ torch.arange(rows, device=panels.device)[:, None] % 8
    split = panels.reshape(*outer, rows, 8, 8)
    return split.gather(-2, pieces[..., None].expand(split.shape)).flatten(-2).contiguous()


def padded(tensor: Tensor, *sizes: int) -> Tensor:
    """Zeros after the end of each dimension, up to ``sizes``."""
    out = tensor.new_zeros(sizes)
    out[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def pack_w1(w1: Tensor) -> Tensor:
    """[F, K] -> [chunks, panels of K, 64, 64], as shared memory holds them."""
    hidden, in_dim = w1.shape
    square = padded(w1, round_up(hidden, PANEL), round_up(in_dim, PANEL))
    return swizzled(square.reshape(-1, PANEL, square.shape[1] // PANEL, PANEL).transpose(1, 2))


def pack_w2(w2: Tensor) -> Tensor:
    """[N, F] -> [chunks, N up to 16s, 64], as shared memory holds them."""
    out_dim, hidden = w2.shape
    square = padded(w2, round_up(out_dim, UNIT), round_up(hidden, PANEL))
    return swizzled(square.reshape(square.shape[0], -1, PANEL).transpose(0, 1))


def unpack_w1(packed: Tensor, hidden: int, in_dim: int) -> Tensor:
    """What ``pack_w1`` was given: swizzling twice is swizzling never."""
    square = swizzled(packed).transpose(1, 2).flatten(2).flatten(0, 1)
    return square[:hidden, :in_dim]


def unpack_w2(packed: Tensor, out_dim: int, hidden: int) -> Tensor:
    """What ``pack_w2`` was given."""
    return swizzled(packed).transpose(0, 1).flatten(1)[:out_dim, :hidden]


class PackedWeights:
    """Weights in the layout of csrc/cuda/layout.h, zeros wherever a tile is larger than the matrix."""

    def __init__(self, op: FusedMlp, device: torch.device, dtype: torch.dtype) -> None:
        def vector(values: Tensor | None, fill: float, size: int, unit: int) -> Tensor:
            filled = torch.full((size,), fill) if values is None else values.detach().float().cpu()
            return padded(filled, round_up(size, unit)).to(device)

        def channels(listed: Sequence[int] | None) -> Tensor | None:
            return None if listed is None else torch.tensor(listed, dtype=torch.int32, device=device)

        out_dim, hidden = op.w2.shape
        self.w1 = pack_w1(op.w1.detach().to(device, dtype))
        self.w2 = pack_w2(op.w2.detach().to(device, dtype))
        self.b1 = vector(op.b1, 0.0, hidden, PANEL)
        self.b2 = vector(op.b2, 0.0, out_dim, UNIT)
        self.gamma = vector(op.gamma, 1.0, out_dim, UNIT)
        self.reads, self.writes = channels(op.reads), channels(op.writes)

    def unpacked(self, op: FusedMlp) -> FusedMlp:
        """``op``, which has the shapes, with these weights: W1 and W2 as they were rounded."""
        out_dim, hidden = op.w2.shape
        return replace(
            op,
            w1=unpack_w1(self.w1, hidden, op.w1.shape[1]),
            w2=unpack_w2(self.w2, out_dim, hidden),
            b1=None if op.b1 is None else self.b1[:hidden],
            b2=None if op.b2 is None else self.b2[:out_dim],
            gamma=None if op.gamma is None else self.gamma[:out_dim],
        )

    def buffers(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in ("w1", "w2", "b1", "b2", "gamma", "reads", "writes")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def padding(self, op: FusedMlp) -> int:
        """Bytes of packed weights that are zeros for the tiles' sake."""
        return (self.w1.numel() - op.w1.numel() + self.w2.numel() - op.w2.numel()) * self.w1.element_size()


def _memory(tensor: Tensor | None) -> tuple[int, int] | None:
    return None if tensor is None else (tensor.data_ptr(), tensor.nbytes)


class CudaMlp:
    """A packed fused_mlp. Which kernel runs it is decided when it is bound."""

    def __init__(self, extension: ModuleType, op: FusedMlp, target: Target) -> None:
        self.extension, self.op, self.target = extension, op.to(SHAPES), target
        self.weights = PackedWeights(op, target.device, target.dtype)
        if target.overlaps and target.device.type == "cuda":
            # kernels fetch weights before they wait for the launch ahead: that may not be the one that packs them
            torch.cuda.current_stream(target.device).synchronize()

    @cached_property
    def triton(self) -> Any:
        """The same as two Triton kernels, with weights of its own."""
        from . import _triton

        return _triton.Packed(self.weights.unpacked(self.op), self.target)

    def problem(self, x: Tensor) -> Problem:
        op = self.op
        rows, _ = matrix_of("x", x)
        return Problem("fused_mlp", (rows, op.hidden_dim, op.embed_dim), (op.w1.shape[1], op.w2.shape[0]))

    def choice(self, x: Tensor) -> tuple[str | None, str]:
        """The kernel for this buffer (None: the extension's own table decides), and who chose it."""
        forced = os.environ.get(KERNEL_VARIABLE)
        if forced is not None:
            expect(forced in MLP_KERNELS, f"a kernel in {KERNEL_VARIABLE}", got=forced, want=MLP_KERNELS)
            return forced, f"{KERNEL_VARIABLE} asks for it"
        tuning = self.target.tuning
        tuned = None if tuning is None else tuning.kernel_for(self.problem(x), self.target.dtype)
        return (None, "by rule: not measured here") if tuned is None else (tuned, "measured fastest here")

    def serving(self, x: Tensor) -> Any:
        """What runs this buffer: this, or the Triton pair."""
        return self.triton if self.choice(x)[0] == "triton" else self

    def candidates(self, x: Tensor) -> list[str]:
        """The kernels that take this buffer on this GPU."""

        def takes(kernel: str) -> bool:
            try:
                self._planned(x, kernel)
            except ValueError:
                return False
            return True

        return [*filter(takes, CUDA_MLP_KERNELS), "triton"]

    def plan(self, x: Tensor) -> Any:
        """The extension's Plan for this buffer: which of its kernels runs, its tile, its workspace."""
        kernel, _ = self.choice(x)
        try:
            return self._planned(x, kernel)
        except ValueError as refusal:
            if kernel is None or KERNEL_VARIABLE in os.environ:
                raise
            raise ContractError(f"expected tuning.json to name a kernel that runs here, tune anew: {refusal}") from None

    def _shape(self, x: Tensor) -> Any:
        rows, _ = matrix_of("x", x)
        return self.extension.Shape(
            rows, self.op.embed_dim, self.op.w1.shape[1], self.op.hidden_dim, self.op.w2.shape[0]
        )

    def _planned(self, x: Tensor, kernel: str | None) -> Any:
        return self.extension.Plan(self._shape(x), self.extension.Device.of(x.get_device()), kernel)

    def bind(self, x: Tensor) -> Launch:
        self.op.check(self.target, x)
        serving = self.serving(x)
        launch: Launch = self._bound(x, self.plan(x)) if serving is self else serving.bind(x)
        return launch

    def bind_with(self, x: Tensor, kernel: str) -> Launch:
        """Bound to one of the ``candidates``."""
        self.op.check(self.target, x)
        launch: Launch = self.triton.bind(x) if kernel == "triton" else self._bound(x, self._planned(x, kernel))
        return launch

    def _bound(self, x: Tensor, plan: Any) -> Launch:
        from .._launch import scratch_for  # Triton comes with it

        op, native = self.op, self.extension
        _, pitch = matrix_of("x", x)
        device = x.get_device()
        workspace = scratch_for(x, (plan.workspace_bytes,), torch.uint8) if plan.workspace_bytes else None
        weights = {name: _memory(getattr(self.weights, name)) for name in ("w1", "w2", "b1", "b2", "gamma")}
        lists = {name: _memory(getattr(self.weights, name)) for name in ("reads", "writes")}
        mlp = native.Mlp(
            plan,
            self._shape(x),
            dtype_name(self.target.dtype),
            op.act,
            op.eps,
            native.Weights(**weights, **lists),
            (x.data_ptr(), pitch),
            _memory(workspace),
            device,
            self.target.overlaps,
        )
        # whoever holds the launch holds every buffer that it reads or writes
        return partial(_launch, mlp, device, (self.weights, x, workspace))


def _launch(mlp: object, device: int, held: object) -> None:
    mlp.launch(torch.cuda.current_stream(device).cuda_stream)  # type: ignore[attr-defined]


def pack(op: FusedMlp, target: Target) -> PackedOp:
    """The CUDA extension's kernels; the Triton pair, with a warning, where the extension is not built or cannot run."""
    if target.device.type != "cuda":  # kernels interpreted, or compiled for a GPU that is not there: Triton's alone
        from . import _triton

        return _triton.Packed(op, target)
    try:
        extension = import_module("prunevit_kernels._cuda")
        extension.Device.of(target.device.index or 0)  # its runtime library may be newer than the driver
    except (ModuleNotFoundError, RuntimeError) as error:
        why = f"does not run here ({error})"
        if isinstance(error, ModuleNotFoundError):
            if error.name != "prunevit_kernels._cuda":
                raise
            why = "is not built"
        warnings.warn(
            f"prunevit_kernels._cuda {why}: fused_mlp runs as two Triton kernels. "
            f"With the nvcc of this driver's CUDA on PATH, build it: {BUILD_COMMAND}",
            stacklevel=2,
        )
        from . import _triton

        return _triton.Packed(op, target)
    return CudaMlp(extension, op, target)
