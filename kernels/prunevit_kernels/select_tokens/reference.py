"""Keep the tokens with the highest scores, in their order; optionally fuse the others into one."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_tokens(scores: Tensor, keep: int, prefix: int) -> Tensor:
    """scores [B, N] -> [B, prefix + keep] ascending indices. Prefix tokens always stay; ties go to the earlier."""
    order = torch.argsort(scores[:, prefix:], dim=1, descending=True, stable=True)
    patches = torch.sort(order[:, :keep], dim=1).values + prefix
    head = torch.arange(prefix, device=scores.device).expand(len(scores), prefix)
    return torch.cat([head, patches], dim=1)


def select_tokens(x: Tensor, scores: Tensor, keep: int, prefix: int, fuse: bool = False) -> tuple[Tensor, Tensor]:
    """x [B, N, E], scores [B, N] -> x [B, prefix + keep (+ 1), E] and the scores of its tokens.

    ``fuse`` appends the mean of the dropped tokens weighted by their scores (EViT §3.3), scored by their sum.
    """
    index = kept_tokens(scores, keep, prefix)
    kept_x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    kept_scores = scores.gather(1, index)
    if not fuse:
        return kept_x, kept_scores
    dropped = scores.scatter(1, index, 0.0)
    total = dropped.sum(dim=1, keepdim=True)
    weight = dropped / total.clamp_min(1e-20)  # in the scores' dtype: in fp16 both may be zero
    fused = (weight[..., None].to(x.dtype) * x).sum(dim=1, keepdim=True)
    return torch.cat([kept_x, fused], dim=1), torch.cat([kept_scores, total], dim=1)
