"""o_h = softmax2(q_h k_hᵀ) v_h for every head h, each of its own widths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..heads import HeadTable


def softmax2(scores: Tensor) -> Tensor:
    """2^s / Σ 2^s over the last dimension: softmax whose log2 e has been folded into the queries."""
    return torch.softmax(scores * math.log(2), dim=-1)


def probabilities(qkv: Tensor, heads: HeadTable, h: int) -> Tensor:
    """[..., N, N]: how much each query of head h attends to each key."""
    q = qkv[..., heads.q[h] : heads.q[h] + heads.qk_dims[h]]
    k = qkv[..., heads.k[h] : heads.k[h] + heads.qk_dims[h]]
    return softmax2(q @ k.transpose(-2, -1))


def ragged_attention(qkv: Tensor, heads: HeadTable) -> Tensor:
    """qkv [..., N, heads.width] -> [..., N, heads.out_width]; alignment gaps come out zero."""
    out = qkv.new_zeros(*qkv.shape[:-1], heads.out_width)
    for h, dv in enumerate(heads.v_dims):
        v = qkv[..., heads.v[h] : heads.v[h] + dv]
        out[..., heads.o[h] : heads.o[h] + dv] = probabilities(qkv, heads, h) @ v
    return out
