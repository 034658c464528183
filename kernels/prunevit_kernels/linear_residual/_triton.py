"""linear_residual on NVIDIA GPUs: a product whose epilogue adds to the residual stream in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, linear_tile
from .._expect import matrix_of
from .._launch import Call, TritonOp, expect_rows
from .._linear import PackedLinear, locate_tile, multiply, padded_vector, store_columns
from .._overlap import await_launches
from ..target import Target
from . import LinearResidual


@triton.jit(do_not_specialize=["M", "D", "K", "c_row8", "w_row8", "x_row8"])
def linear_residual_kernel(
    c, w, bias, gamma, writes, x, M, D, K, c_row8, w_row8, x_row8,
    GAMMA: tl.constexpr, WRITES: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_launches(PDL)
    # locate
    first_row, rows, present, first_col = locate_tile(M, D, BLOCK_M, BLOCK_N)
    cols = first_col + tl.arange(0, BLOCK_N)
    c_rows = c + first_row * c_row8 * 8 + rows * (c_row8 * 8)
    w_rows = w + tl.minimum(cols, D - 1) * (w_row8 * 8)
    x_rows = x + first_row * x_row8 * 8 + rows * (x_row8 * 8)

    # load and multiply: the residual first, so that nothing waits for it behind the product
    if WRITES:
        ptrs = x_rows[:, None] + tl.load(writes + cols)[None, :]
        inside = present[:, None] & (cols < D)[None, :]
    else:
        ptrs = x_rows[:, None] + cols[None, :]
        inside = (cols < tl.cdiv(D, 8) * 8)[None, :]  # read 16 bytes at a time; what is past column D is not used
    residual = tl.load(ptrs, mask=inside, other=0.0)
    acc, _, _ = multiply(c_rows, w_rows, K, False, TAIL, BLOCK_M, BLOCK_N, BLOCK_K, STAGES)

    # finish in fp32
    b = tl.load(bias + cols)
    acc += b[None, :]
    if GAMMA:
        g = tl.load(gamma + cols)
        acc *= g[None, :]

    acc += residual.to(tl.float32)

    # store
    if WRITES:
        tl.store(ptrs, acc.to(x.dtype.element_ty), mask=inside)
    else:
        store_columns(x_rows, first_col, D, present, acc, BLOCK_N)


class ResidualLinear:
    """A packed linear with what its epilogue needs: γ, and the channels that it updates."""

    def __init__(
        self, target: Target, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, writes: tuple[int, ...] | None
    ) -> None:
        self.linear = PackedLinear(weight, bias, target.device, target.dtype)
        self.gamma = None if gamma is None else padded_vector(gamma.detach().float()).to(target.device)
        listed = None if writes is None else torch.tensor(writes, dtype=torch.int32)
        self.writes = None if listed is None else padded_vector(listed).to(target.device)

    def call(self, c: Tensor, x: Tensor, target: Target) -> Call:
        rows, c_pitch = matrix_of("c", c)
        _, x_pitch = matrix_of("x", x)
        linear = self.linear
        problem = Problem("linear_residual", (rows, linear.out_dim, linear.in_dim))
        tile = linear_tile(target, problem)
        pitches = [pitch // 8 for pitch in (c_pitch, linear.weight.stride(0), x_pitch)]
        gamma = linear.bias if self.gamma is None else self.gamma
        writes = linear.bias if self.writes is None else self.writes
        args = (c, linear.weight, linear.bias, gamma, writes, x, rows, linear.out_dim, linear.in_dim, *pitches)
        epilogue = {"GAMMA": self.gamma is not None, "WRITES": self.writes is not None}
        constants = {**epilogue, **linear.constants(tile, target)}
        return Call(linear_residual_kernel, linear.programs(rows, tile), args, constants, tile, problem)


class Packed(TritonOp[LinearResidual]):
    def __init__(self, op: LinearResidual, target: Target) -> None:
        super().__init__(op, target)
        self.linear = ResidualLinear(target, op.weight, op.bias, op.gamma, op.writes)

    def calls(self, c: Tensor, x: Tensor) -> list[Call]:
        expect_rows("c", c)
        expect_rows("x", x)
        return [self.linear.call(c, x, self.target)]
