"""LayerNorm with affine, of rows that a program holds whole."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._configs import Tile


@triton.jit
def layer_norm(x, cols, E, affine, eps):
    """x [rows, ≥ E] in fp32, normalised over its first E columns; ``affine`` is a weight, then a bias, E each."""
    # widths are rarely powers of two: dead lanes must not enter the variance
    inside = (cols < E)[None, :]
    mean = tl.sum(tl.where(inside, x, 0.0), 1) / E
    x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, 1) / E + eps)
    weight = tl.load(affine + cols, mask=cols < E, other=0.0)
    bias = tl.load(affine + E + cols, mask=cols < E, other=0.0)
    return x * rstd[:, None] * weight[None, :] + bias[None, :]


def rows_tile(width: int) -> Tile:
    """A few whole rows a program: about 8 K elements."""
    block_n = max(16, 1 << (width - 1).bit_length())
    return Tile(block_m=max(1, min(16, 8192 // block_n)), block_n=block_n, warps=8 if block_n >= 1024 else 4)


def packed_affine(norm: Tensor | None, device: torch.device) -> Tensor | None:
    return None if norm is None else norm.detach().to(device, torch.float32).contiguous()
