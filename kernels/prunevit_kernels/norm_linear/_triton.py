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
from .._overlap import await_launches
from ..target import Target
from . import NormLinear


@triton.jit(do_not_specialize=["M", "D", "K", "x_row8", "w_row8", "y_pitch"])
def norm_linear_kernel(
    x, w, column_sums, bias, y, M, D, K, x_row8, w_row8, y_pitch, eps,
    NORM: tl.constexpr, ACT: tl.constexpr, Y_UNIT: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_launches(PDL)
    # locate
    first_row, rows, present, first_col = locate_tile(M, D, BLOCK_M, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_N)
    x_rows = x + first_row * x_row8 * 8 + rows * (x_row8 * 8)
    w_rows = w + tl.minimum(cols, D - 1) * (w_row8 * 8)
    y_rows = y + first_row * y_pitch * Y_UNIT + rows * (y_pitch * Y_UNIT)  # a row of logits may start anywhere

    # load and multiply
    acc, mean, m2 = multiply(x_rows, w_rows, K, NORM, TAIL, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)

    # finish in fp32
    b = tl.load(bias + cols)
    if NORM:
        sums = tl.load(column_sums + cols)
        rstd = tl.rsqrt(m2 / K + eps)
        acc = (acc - mean[:, None] * sums[None, :]) * rstd[:, None]
    acc = activate(acc + b[None, :], ACT)

    # store
    store_columns(y_rows, first_col, D, present, acc, BLOCK_N)


def linear_call(
    x: Tensor, y: Tensor, linear: PackedLinear, target: Target, eps: float | None = None, act: str | None = None
) -> Call:
    """y = act(LN(x) Wᵀ + b), without the norm where ``eps`` is None. x and y are [B, N, C]."""
    rows, x_pitch = matrix_of("x", x)
    _, y_pitch = matrix_of("y", y)
    sizes = (rows, linear.out_dim, linear.in_dim)
    problem = Problem("linear" if eps is None else "norm_linear", sizes, variant=(int(act is not None),))
    tile = linear_tile(target, problem)
    unit = 8 if y_pitch % 8 == 0 else 1
    pitches = (x_pitch // 8, linear.weight.stride(0) // 8, y_pitch // unit)
    args = (x, linear.weight, linear.column_sums, linear.bias, y, *sizes, *pitches, eps or 0.0)
    constants = {"NORM": eps is not None, "ACT": act, "Y_UNIT": unit, **linear.constants(tile, target)}
    return Call(norm_linear_kernel, linear.programs(rows, tile), args, constants, tile, problem)


class Packed(TritonOp[NormLinear]):
    def __init__(self, op: NormLinear, target: Target) -> None:
        super().__init__(op, target)
        self.linear = PackedLinear(op.weight, op.bias, target.device, target.dtype, op.embed_dim, op.reads)

    def calls(self, x: Tensor, y: Tensor) -> list[Call]:
        expect_rows("x", x)
        expect_rows("y", y)
        return [linear_call(x, y, self.linear, self.target, self.op.eps)]
