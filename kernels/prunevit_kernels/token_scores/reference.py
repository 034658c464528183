"""How much attention each token receives, summed over heads."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..heads import HeadTable
from ..ragged_attention.reference import probabilities

Rule = Literal["max_attention", "class_attention"]


def token_scores(qkv: Tensor, heads: HeadTable, rule: Rule) -> Tensor:
    """qkv [B, N, heads.width] -> [B, N] fp32 (fp64 for fp64).

    ``class_attention``: what the class token (query 0) pays each key (EViT §3.2). ``max_attention``: the most that
    any query pays it (CP-ViT §3.2).
    """
    wide = qkv if qkv.dtype.itemsize == 8 else qkv.float()
    maps = [probabilities(wide, heads, h) for h in range(len(heads))]
    if rule == "class_attention":
        return sum((p[:, 0] for p in maps), wide.new_zeros(wide.shape[:2]))
    return sum((p.amax(dim=1) for p in maps), wide.new_zeros(wide.shape[:2]))
