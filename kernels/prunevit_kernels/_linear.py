"""The Triton kernels of a linear map over rows: with LayerNorm before it, or added to the residual stream after it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Tile
from .target import Target
from .units import round_up

BLOCK_K = 64  # packed weights have zeros up to a multiple of this, so that no load of weights is masked along k
WIDEST_BLOCK = 256  # and vectors of output columns up to one of this: a mask would have them loaded one by one
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by what knows no inline assembly


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == "gelu":
        # x Φ(x) = max(x, 0) − |x| Φ(−|x|), and log2 Φ(−t) is nearly a polynomial: within 7e-7, a third of erf's work
        size = tl.abs(x)
        power = (-4.7488770e-4 * size + 7.0933281e-3) * size - 5.1844325e-2
        power = ((power * size - 0.45997828) * size - 1.1507930) * size - 1.0000373
        x = tl.maximum(x, 0.0) - size * tl.exp2(power)
    elif ACT == "gelu_tanh":
        # tanh(u) = 2 σ(2u) − 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def touched(x):
    """x itself, through a move that ptxas drops: what Triton does for a use of x, it does here, and not elsewhere."""
    if not INTERPRETED:
        BITS: tl.constexpr = x.dtype.primitive_bitwidth
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=32 // BITS)
    return x


@triton.jit
def _by_eights(x):
    """Sums of eight neighbouring columns. A thread has them together, as one 16-byte load: no lane asks another."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 8, 8]), 2)


@triton.jit
def multiply(
    x_rows, w_rows, K, NORM: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x Wᵀ over K columns; with NORM, also each row's mean and sum of squared deviations.

    Rows of x may hold anything past column K. TAIL is what a multiple of BLOCK_K leaves, as a power of two.

    Deviations are summed from a row's first value, since sums of raw squares would cancel. It may be far from the
    mean, but not far compared with the row's deviation σ: (first − mean)² ≤ K σ², so that no more than a factor of K
    is lost of fp32's 2⁻²⁴.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    if NORM:
        pivot = tl.load(x_rows).to(tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_K // 8], tl.float32)
        squares = tl.zeros([BLOCK_M, BLOCK_K // 8], tl.float32)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_rows[:, None] + k[None, :]
    w_ptrs = w_rows[None, :] + k[:, None]
    whole = K // BLOCK_K * BLOCK_K
    if TAIL > 0:  # loaded here, so that nothing waits for it behind the loop
        k_tail = whole + tl.arange(0, TAIL)
        # whole groups of 8 are read, for 16-byte loads; what lies past column K is then replaced by zeros
        groups = (k_tail < tl.cdiv(K, 8) * 8)[None, :]
        inside = (k_tail < K)[None, :]
        x_tail = tl.load(x_rows[:, None] + k_tail[None, :], mask=groups, other=0.0)
        w_tail = tl.load(w_rows[None, :] + k_tail[:, None])
    for first in tl.range(0, whole, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_ptrs + first)
        acc = tl.dot(x, tl.load(w_ptrs + first), acc)
        if NORM:
            x = x.to(tl.float32) - pivot[:, None]
            sums += _by_eights(x)
            squares += _by_eights(x * x)
            # Waits for the product. Triton gives a tile that is not multiplied alone no slot for a product still in
            # flight: the copy of the step after the next would land in what is being multiplied.
            acc = touched(acc)
    if NORM:
        deviation = tl.sum(sums, 1)
        m2 = tl.sum(squares, 1)
    if TAIL > 0:
        x = tl.where(inside, x_tail, 0.0)
        # stored to shared memory here: the loop's first copies would wait for that
        acc = tl.dot(x, touched(w_tail), acc)
        if NORM:
            x = tl.where(inside, x.to(tl.float32) - pivot[:, None], 0.0)
            deviation += tl.sum(x, 1)
            m2 += tl.sum(x * x, 1)
    if NORM:
        m2 = tl.maximum(m2 - deviation * (deviation / K), 0.0)
        mean = pivot + deviation / K
    return acc, mean, m2


@triton.jit
def store_columns(rows, first_col, D, row_mask, value, BLOCK_N: tl.constexpr):
    """Columns first_col … below D, 16 bytes at a time; only a last group that is not whole goes one by one."""
    value = value.to(rows.dtype.element_ty)
    whole = D // 8 * 8
    cols = first_col + tl.arange(0, BLOCK_N)
    ptrs = rows[:, None] + cols[None, :]
    tl.store(ptrs, value, mask=row_mask[:, None] & (cols < whole)[None, :])
    if whole < D and first_col + BLOCK_N > whole:
        tl.store(ptrs, value, mask=row_mask[:, None] & ((cols >= whole) & (cols < D))[None, :])


@triton.jit
def locate_tile(M, D, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's first row, its rows counted from there, which of them exist, and its first column.

    Programs with the same rows run one after another, so that all but the first find them in the L2 cache. Rows past
    the last are the last one again: no load needs a mask, and nothing out of bounds is read.
    """
    blocks = tl.cdiv(D, BLOCK_N)
    first_row = tl.program_id(0) // blocks * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    present = rows < M - first_row
    first_col = tl.program_id(0) % blocks * BLOCK_N
    return first_row.to(tl.int64), tl.minimum(rows, M - first_row - 1), present, first_col


def padded_vector(values: Tensor) -> Tensor:
    """With zeros up to a multiple of the widest block of columns."""
    return torch.nn.functional.pad(values, (0, -len(values) % WIDEST_BLOCK))


class PackedLinear:
    """A weight [D, K] and bias as the kernels read them: 16-bit, rows zero-padded to a multiple of BLOCK_K.

    ``channels`` puts the weight's columns where they read from a row of ``in_dim``; other columns are zero. A gather
    of 2-byte columns cannot be copied 16 bytes at a time, so multiplying by zeros is the cheaper way to skip some.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, device: torch.device, dtype: torch.dtype,
        in_dim: int | None = None, channels: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.out_dim, self.in_dim = weight.shape[0], in_dim or weight.shape[1]
        padded = round_up(self.in_dim, BLOCK_K)
        self.weight = torch.zeros(self.out_dim, padded, device=device, dtype=dtype)
        columns = torch.arange(self.in_dim) if channels is None else torch.tensor(channels)
        self.weight[:, columns.to(device)] = weight.detach().to(device, dtype)
        # the sums of what the kernel multiplies by, that is, after rounding
        self.column_sums = padded_vector(self.weight.double().sum(1).float())
        self.bias = padded_vector(torch.zeros(self.out_dim) if bias is None else bias.detach().float()).to(device)

    def tail(self, block_k: int) -> int:
        """What a multiple of ``block_k`` leaves of the input columns, as a power of two from 16; 0 for nothing."""
        left = self.in_dim % block_k
        return 0 if left == 0 else max(16, 1 << (left - 1).bit_length())

    def constants(self, tile: Tile, target: Target) -> dict[str, object]:
        return {
            "TAIL": self.tail(tile.block_k), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k, "STAGES": tile.stages, "PDL": target.overlaps,
        }  # fmt: skip

    def programs(self, rows: int, tile: Tile) -> int:
        return -(-rows // tile.block_m) * -(-self.out_dim // tile.block_n)
