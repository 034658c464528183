"""norm_linear on NVIDIA GPUs: the norm folded into the product, which runs on the rows as they are.

With W' = W and s its row sums, LN(x) Wᵀ = rstd · (x Wᵀ − mean · sᵀ). The rows enter the product unrounded, so this
is no less accurate than rounding LN(x) to 16 bits first; mean · s is taken from an fp32 accumulator.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, linear_tile
from .._expect import matrix_of
from .._launch import Call, TritonOp, expect_rows
from .._linear import PackedLinear, activate, locate_tile, multiply, store_columns
from ..target import Target
from . import NormLinear


@triton.jit(do_not_specialize=["M", "D", "K", "x_row8", "w_row8", "y_row8"])
def norm_linear_kernel(
    x, w, column_sums, bias, y, M, D, K, x_row8, w_row8, y_row8, eps,
    NORM: tl.constexpr, ACT: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # locate
    first_row, rows, present, cols = locate_tile(M, D, BLOCK_M, BLOCK_N)
    x_rows = x + first_row * x_row8 * 8 + rows * (x_row8 * 8)
    w_rows = w + tl.minimum(cols, D - 1) * (w_row8 * 8)
    y_rows = y + first_row * y_row8 * 8 + rows * (y_row8 * 8)

    # load and multiply
    acc, mean, m2 = multiply(x_rows, w_rows, K, NORM, TAIL, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)

    # finish in fp32
    b = tl.load(bias + cols, mask=cols < D, other=0.0)
    if NORM:
        sums = tl.load(column_sums + cols, mask=cols < D, other=0.0)
        rstd = tl.rsqrt(m2 / K + eps)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    acc = activate(acc + b[None, :], ACT)

    # store
    store_columns(y_rows, cols, D, present, acc, BLOCK_N)


def linear_call(
    x: Tensor, y: Tensor, linear: PackedLinear, target: Target, eps: float | None = None, act: str | None = None
) -> Call:
    """y = act(LN(x) Wᵀ + b), without the norm where ``eps`` is None. x and y are [B, N, C]."""
    rows, x_pitch = matrix_of("x", x)
    _, y_pitch = matrix_of("y", y)
    kernel = "linear" if eps is None else "norm_linear"
    problem = Problem(kernel, (rows, linear.out_dim, linear.in_dim))  # type: ignore[arg-type]
    tile = linear_tile(target, problem)
    pitches = [pitch // 8 for pitch in (x_pitch, linear.weight.stride(0), y_pitch)]
    args = (
        x,
        linear.weight,
        linear.column_sums,
        linear.bias,
        y,
        rows,
        linear.out_dim,
        linear.in_dim,
        *pitches,
        eps or 0.0,
    )
    constants = {"NORM": eps is not None, "ACT": act, **linear.constants(tile)}
    return Call(norm_linear_kernel, linear.programs(rows, tile), args, constants, tile, problem)


class _Packed(TritonOp[NormLinear]):
    def __init__(self, op: NormLinear, target: Target) -> None:
        super().__init__(op, target)
        self.linear = PackedLinear(op.weight, op.bias, target.device, target.dtype, op.embed_dim, op.reads)

    def calls(self, x: Tensor, y: Tensor) -> list[Call]:
        expect_rows("x", x)
        expect_rows("y", y)
        return [linear_call(x, y, self.linear, self.target, self.op.eps)]


def pack(op: NormLinear, target: Target) -> _Packed:
    return _Packed(op, target)
