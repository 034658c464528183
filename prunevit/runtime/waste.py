"""What a backend multiplies beside what is useful: tiles and lanes that stick out, gaps, zero columns.

One function a backend, from an op and the buffers that it is bound to, to the multiply-accumulates that its kernel
executes for the whole batch. They follow the kernels' own loops, which the comments name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from prunevit_kernels import (
    FusedMlp,
    LinearResidual,
    NormLinear,
    Op,
    PackedOp,
    PatchEmbed,
    PoolHead,
    RaggedAttention,
    SelectTokens,
    TokenScores,
)
from prunevit_kernels.units import round_up

LANES = {"avx512": 16, "avx2": 8, "baseline": 4}  # fp32 numbers in a vector


def cpu_macs(op: Op, buffers: Sequence[Tensor], lanes: int) -> int | None:
    """The C++ kernels: weights lie in panels whose last vector is filled with zeros; rows and inputs are exact.

    Attention has queries in its lanes, so that head widths are exact and the last vector of queries is not.
    """
    if isinstance(op, NormLinear | LinearResidual):
        return _rows(buffers[0]) * op.weight.shape[1] * round_up(op.weight.shape[0], lanes)
    if isinstance(op, FusedMlp):
        first = op.w1.shape[1] * round_up(op.w1.shape[0], lanes)
        second = op.w2.shape[1] * round_up(op.w2.shape[0], lanes)
        return _rows(buffers[0]) * (first + second)
    if isinstance(op, RaggedAttention):
        per_pair = sum(op.heads.qk_dims) + sum(op.heads.v_dims)
        batch, keys = buffers[0].shape[:2]
        return batch * round_up(buffers[1].shape[1], lanes) * keys * per_pair
    if isinstance(op, TokenScores):
        batch, keys = buffers[0].shape[:2]
        return batch * round_up(op.queries(keys), lanes) * keys * sum(op.heads.qk_dims)
    if isinstance(op, PatchEmbed):
        embed_dim = op.weight.shape[0]
        return buffers[0].shape[0] * len(op.positions) * op.weight[0].numel() * round_up(embed_dim, lanes)
    if isinstance(op, SelectTokens):
        return 0
    if isinstance(op, PoolHead):
        if op.weight is None:
            return 0
        return _pooled_rows(op, buffers) * op.weight.shape[1] * round_up(op.weight.shape[0], lanes)
    return None


def cuda_macs(op: Op, packed: PackedOp, buffers: Sequence[Tensor]) -> int | None:
    """The GPU kernels: whole tiles of rows and columns, alignment gaps, heads at their width class.

    Triton's calls say which tile they chose; the CUDA MLP plans anew what it planned when it was bound.
    """
    calls = getattr(packed, "calls", None)
    if isinstance(op, RaggedAttention) and calls is not None:
        return _triton_attention(calls(*buffers)[0], packed, buffers)
    if isinstance(op, TokenScores) and calls is not None:
        return sum(_triton_scores(call, op, buffers) for call in calls(*buffers))
    if isinstance(op, NormLinear | LinearResidual | PatchEmbed | PoolHead | FusedMlp) and calls is not None:
        return sum(_triton_linear(call) for call in calls(*buffers))
    if isinstance(op, SelectTokens):
        return 0
    if isinstance(op, FusedMlp) and hasattr(packed, "extension"):
        weights = packed.weights  # type: ignore[attr-defined]
        padded = int(weights.w1.numel() + weights.w2.numel())  # to panels of 64, and of 16 output columns
        return round_up(_rows(buffers[0]), packed.plan(buffers[0]).tile_rows) * padded  # type: ignore[attr-defined]
    return None


def _triton_linear(call: Any) -> int:
    """The kernels of ``_linear.py``: whole tiles; the input columns' tail up to a power of two."""
    if call.problem.kernel not in ("norm_linear", "linear", "linear_residual", "patch_embed"):
        return 0
    rows, out, columns = call.problem.sizes
    tile, tail = call.tile, call.constants.get("TAIL")
    padded = round_up(columns, tile.block_k) if tail is None else columns // tile.block_k * tile.block_k + tail
    return int(round_up(rows, tile.block_m) * round_up(out, tile.block_n) * padded)


def _triton_attention(call: Any, packed: Any, buffers: Sequence[Tensor]) -> int:
    """Whole blocks of queries; keys in steps of 16; each head at its class's widths."""
    batch, keys = buffers[0].shape[:2]
    queries = round_up(buffers[1].shape[1], call.tile.block_m)
    widths = sum(sum(packed.menu[int(row[0])]) for row in packed.table.tolist())
    return int(batch * queries * round_up(keys, 16) * widths)


def _triton_scores(call: Any, op: TokenScores, buffers: Sequence[Tensor]) -> int:
    """Each launch multiplies whole blocks of queries by whole blocks of keys, all heads at the widest one's width."""
    batch, keys = buffers[0].shape[:2]
    queries = round_up(op.queries(keys), call.tile.block_m)
    width = call.constants["Q0"] + call.constants["Q1"]
    return int(batch * len(op.heads) * queries * round_up(keys, call.tile.block_n) * width)


def _rows(buffer: Tensor) -> int:
    return buffer.shape[0] * buffer.shape[1]


def _pooled_rows(op: PoolHead, buffers: Sequence[Tensor]) -> int:
    return _rows(buffers[0]) if op.pool == "none" else buffers[0].shape[0]
