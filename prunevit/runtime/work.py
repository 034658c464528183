"""What a step's op works on, in words and bytes, and which kernel runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prunevit_kernels import (
    FusedMlp,
    LinearResidual,
    NormLinear,
    Op,
    PatchEmbed,
    PoolHead,
    RaggedAttention,
    SelectTokens,
    Target,
    TokenScores,
)
from prunevit_kernels.cpu import extension
from prunevit_kernels.target import BUILD_COMMAND, cpu_extension_built

from .latent_pool import LatentPool
from .waste import LANES, cpu_macs, cuda_macs


class Kernel(NamedTuple):
    """What ran, and why that."""

    name: str
    why: str


def kernel_of(op: Op, packed: Any, buffers: Sequence[Tensor], target: Target) -> tuple[Kernel, int | None]:
    """The kernel of a packed op, and the multiply-accumulates that it executes where they are known."""
    kind = type(packed).__module__.rsplit(".", 1)[-1]
    if isinstance(op, LatentPool):
        return Kernel("PyTorch", "attention pooling is timm's own module: no kernel of its own"), None
    if target.backend == "cpu" and kind == "_native":
        isa = extension().isa()
        return Kernel(f"C++ {isa}", _isa_reason(isa)), cpu_macs(op, buffers, LANES[isa])
    if target.backend == "cuda" and kind in ("_cuda", "_triton"):
        serving = packed.serving(buffers[0]) if isinstance(op, FusedMlp) and kind == "_cuda" else packed
        return _gpu_kernel(op, packed, serving, buffers), cuda_macs(op, serving, buffers)
    return Kernel("PyTorch reference", _reference_reason(target)), None


def _isa_reason(isa: str) -> str:
    best = extension().isas()[0]
    return "the best instruction set here" if isa == best else f"PRUNEVIT_CPU_ISA asks for it; {best} would run too"


def _gpu_kernel(op: Op, packed: Any, serving: Any, buffers: Sequence[Tensor]) -> Kernel:
    dtype = str(buffers[0].dtype).removeprefix("torch.")
    chosen = packed.choice(buffers[0])[1] if hasattr(packed, "choice") else "on a GPU"
    if hasattr(serving, "extension"):
        plan = serving.plan(buffers[0])
        return Kernel(f"CUDA C++ {plan.kernel}, {plan.tile_rows} rows", f"{dtype}; {chosen}")
    tiles = {f"{call.tile.block_m}×{call.tile.block_n}" for call in serving.calls(*buffers)}
    missing = isinstance(op, FusedMlp) and serving is packed
    why = f"{dtype}; the CUDA extension is not built" if missing else f"{dtype}; {chosen}"
    return Kernel(f"Triton {', '.join(sorted(tiles))}", why)


def _reference_reason(target: Target) -> str:
    if target.device.type == "cpu" and target.dtype == torch.float32:
        return "backend torch was asked for" if cpu_extension_built() else f"no C++ kernels: run `{BUILD_COMMAND}`"
    if target.device.type == "cpu":
        return f"no C++ kernel for {str(target.dtype).removeprefix('torch.')}"
    return f"backend torch was asked for, or {str(target.dtype).removeprefix('torch.')} has no kernel"


def work_of(op: Op, buffers: Sequence[Tensor]) -> str:
    """The op's sizes, as a product: rows × in → out."""
    rows = buffers[0].shape[1] if buffers[0].dim() == 3 else 0
    if isinstance(op, NormLinear | LinearResidual):
        return f"{rows} × {op.weight.shape[1]} → {op.weight.shape[0]}"
    if isinstance(op, FusedMlp):
        return f"{rows} × {op.w1.shape[1]} → {op.hidden_dim} → {op.w2.shape[0]}"
    if isinstance(op, RaggedAttention):
        heads, queries = op.heads, buffers[1].shape[1]
        widths = f"{_span(heads.qk_dims)} by {_span(heads.v_dims)}"
        return f"{queries} × {rows}, {len(heads)} heads of {widths}"
    if isinstance(op, TokenScores):
        return f"{rows} tokens, {len(op.heads)} heads"
    if isinstance(op, SelectTokens):
        return f"{rows} → {op.out_tokens} tokens"
    if isinstance(op, PatchEmbed):
        return f"{len(op.positions)} × {op.weight[0].numel()} → {op.weight.shape[0]}"
    if isinstance(op, PoolHead):
        return f"{op.pooled_dim} → {buffers[1].shape[-1]}"
    return f"{rows} tokens"


def _span(widths: Sequence[int]) -> str:
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}–{high}"


def exponentials(op: Op, buffers: Sequence[Tensor]) -> int:
    """Of the softmax: one for each query and key of each head. A GPU has few units for them, and narrow heads wait."""
    if not isinstance(op, RaggedAttention | TokenScores):
        return 0
    batch, keys = buffers[0].shape[:2]
    queries = buffers[1].shape[1] if isinstance(op, RaggedAttention) else op.queries(keys)
    return int(batch * queries * keys * len(op.heads))


def useful_bytes(op: Op, buffers: Sequence[Tensor], target: Target) -> int:
    """Inputs and weights read once, outputs written once, without any padding; x is both where it is updated."""
    size = target.dtype.itemsize
    names: list[str] = [field.name for field in dataclasses.fields(op)] if dataclasses.is_dataclass(op) else []
    tensors = [value for name in names if isinstance(value := getattr(op, name), Tensor)]
    weights: int = sum(tensor.numel() for tensor in tensors) * size
    if isinstance(op, RaggedAttention):
        heads, (batch, keys), queries = op.heads, buffers[0].shape[:2], buffers[1].shape[1]
        widths = sum(heads.qk_dims) + sum(heads.v_dims)  # of k and v for each key, of q and out for each query
        return batch * (keys + queries) * widths * size
    if isinstance(op, TokenScores):
        batch, keys = buffers[0].shape[:2]
        return batch * (keys + op.queries(keys)) * sum(op.heads.qk_dims) * size + buffers[1].numel() * 4
    if isinstance(op, PoolHead) and op.pool in ("token", "tokens"):
        return weights + (buffers[0].shape[0] * op.pooled_dim + buffers[1].numel()) * size
    moved = sum(buffer.numel() * buffer.itemsize for buffer in buffers)
    if isinstance(op, FusedMlp | LinearResidual):
        moved += buffers[-1].numel() * size  # read and written
    if isinstance(op, LatentPool):
        weights = sum(p.numel() for module in (op.pool, op.head) for p in module.parameters()) * size
    return weights + moved
