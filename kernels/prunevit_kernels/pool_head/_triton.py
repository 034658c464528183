"""pool_head on NVIDIA GPUs: at most one launch that pools, and one product.

The norm next to the linear is folded into it (exact in fp32, before the weights are rounded), so class-token pooling
is a single launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem
from .._launch import Call, TritonOp, expect_rows, scratch_for
from .._linear import PackedLinear
from .._overlap import await_launches
from .._rows import layer_norm, packed_affine, rows_tile
from ..norm_linear._triton import linear_call
from ..target import Target
from . import PoolHead


@triton.jit(do_not_specialize=["ROWS", "TOKENS", "E", "x_image8", "x_row8", "out_image", "out_token"])
def take_tokens_kernel(
    x, affine, fc_affine, out, ROWS, TOKENS, E, x_image8, x_row8, out_image, out_token, eps,
    NORM: tl.constexpr, FC_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first TOKENS of each image, through up to two norms."""
    await_launches(PDL)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = (rows < ROWS)[:, None]
    image = (rows // TOKENS).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x_rows = x + image * x_image8 * 8 + rows % TOKENS * (x_row8 * 8)
    groups = (cols < tl.cdiv(E, 8) * 8)[None, :]
    values = tl.load(x_rows[:, None] + cols[None, :], mask=present & groups, other=0.0).to(tl.float32)
    if NORM:
        values = layer_norm(values, cols, E, affine, eps)
    if FC_NORM:
        values = layer_norm(values, cols, E, fc_affine, eps)
    out_rows = out + image * out_image + rows % TOKENS * out_token
    tl.store(out_rows[:, None] + cols[None, :], values.to(out.dtype.element_ty), mask=present & (cols < E)[None, :])


@triton.jit(do_not_specialize=["N", "E", "PREFIX", "x_image8", "x_row8", "out_image"])
def pool_tokens_kernel(
    x, affine, fc_affine, out, N, E, PREFIX, x_image8, x_row8, out_image, eps,
    POOL: tl.constexpr, NORM: tl.constexpr, FC_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One image: mean, maximum, or half of both, over its tokens behind the prefix."""
    await_launches(PDL)
    image = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x += image * x_image8 * 8
    groups = (cols < tl.cdiv(E, 8) * 8)[None, :]
    total = tl.zeros([BLOCK_N], tl.float32)
    most = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for first in range(PREFIX, N, BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M)
        present = (tokens < N)[:, None]
        x_rows = x + tokens * (x_row8 * 8)
        values = tl.load(x_rows[:, None] + cols[None, :], mask=present & groups, other=0.0).to(tl.float32)
        if NORM:
            values = layer_norm(values, cols, E, affine, eps)
        total += tl.sum(tl.where(present, values, 0.0), 0)
        most = tl.maximum(most, tl.max(tl.where(present, values, float("-inf")), 0))
    pooled = total / (N - PREFIX)
    if POOL == "max":
        pooled = most
    elif POOL == "avgmax":
        pooled = 0.5 * (pooled + most)
    pooled = pooled[None, :]
    if FC_NORM:
        pooled = layer_norm(pooled, cols, E, fc_affine, eps)
    tl.store(out + image * out_image + cols[None, :], pooled.to(out.dtype.element_ty), mask=(cols < E)[None, :])


class Packed(TritonOp[PoolHead]):
    def __init__(self, op: PoolHead, target: Target) -> None:
        super().__init__(op, target)
        before = {"norm": op.norm, "fc_norm": op.fc_norm}
        self.eps: float | None = None
        self.linear: PackedLinear | None = None
        if op.weight is not None:
            weight, bias = op.weight.detach().float(), op.bias
            # the norm that the linear reads, unless a reduction or a second token lies between
            beside = "fc_norm" if op.fc_norm is not None else "norm" if op.pool in ("token", "none") else ""
            norm = before.get(beside)
            if norm is not None:
                scale, shift = norm.detach().float()
                folded = weight @ shift
                weight, bias = weight * scale, folded if bias is None else folded + bias.detach()
                before[beside] = None
                self.eps = op.eps
            self.linear = PackedLinear(weight, bias, target.device, target.dtype)
        self.norm, self.fc_norm = (packed_affine(norm, target.device) for norm in before.values())

    def calls(self, x: Tensor, out: Tensor) -> list[Call]:
        expect_rows("x", x)
        op, (b, n, _) = self.op, x.shape
        logits = out if out.dim() == 3 else out[:, None]
        if self.linear is None:
            return [self._pool(x, out)]
        if op.pool in ("token", "none") and self.norm is None and self.fc_norm is None:
            rows = x[:, :1] if op.pool == "token" else x
            return [linear_call(rows, logits, self.linear, self.target, self.eps)]
        pooled = scratch_for(out, (b, n if op.pool == "none" else 1, op.pooled_dim), x.dtype)
        features = pooled if op.pool == "none" else pooled[:, 0]
        return [self._pool(x, features), linear_call(pooled, logits, self.linear, self.target, self.eps)]

    def _pool(self, x: Tensor, out: Tensor) -> Call:
        b, n, e = x.shape
        op, tile = self.op, rows_tile(e)
        norms = [x if norm is None else norm for norm in (self.norm, self.fc_norm)]  # x: not read
        constants: dict[str, object] = {
            "NORM": self.norm is not None, "FC_NORM": self.fc_norm is not None,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PDL": self.target.overlaps,
        }  # fmt: skip
        problem = Problem("rows", (b, n, e))
        pitches = (x.stride(0) // 8, x.stride(1) // 8)
        if op.pool in ("avg", "max", "avgmax"):
            args = (x, *norms, out, n, e, op.prefix, *pitches, out.stride(0), op.eps)
            return Call(pool_tokens_kernel, b, args, {"POOL": op.pool, **constants}, tile, problem)
        tokens = {"token": 1, "tokens": 2, "none": n}[op.pool]
        out_token = out.stride(1) if op.pool == "none" else e
        args = (x, *norms, out, b * tokens, tokens, e, *pitches, out.stride(0), out_token, op.eps)
        return Call(take_tokens_kernel, -(-b * tokens // tile.block_m), args, constants, tile, problem)
