"""Token selection in eager PyTorch: which attentions give scores, and how the kept tokens are gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Rule, ViTSpec


def scored_blocks(spec: ViTSpec) -> list[bool]:
    """For each block, whether a selection reads the scores of its attention."""
    scored, attentions = [False] * spec.depth, list[int]()
    for i, block in enumerate(spec.blocks):
        # attention and selection in the order in which this block runs them
        steps = [block.select, None] if block.select and block.select.before == "attn" else [None, block.select]
        for select in steps:
            if select is not None:
                for j in attentions if select.cascade else attentions[-1:]:
                    scored[j] = True
            elif block.qk_dims and i not in attentions:
                attentions.append(i)
    return scored


def attention_scores(q: Tensor, k: Tensor, scale: float, rule: Rule) -> Tensor:
    """q, k [B, H, N, Dqk] -> [B, N] fp32: the attention that each token receives, summed over heads.

    ``class_attention``: what the class token (query 0) pays each key (EViT §3.2). ``max_attention``: the most that any
    query pays it (CP-ViT §3.2).
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        rows = q[:, :, :1] if rule == "class_attention" else q
        attention = torch.softmax((rows.to(wide) * scale) @ k.to(wide).transpose(-2, -1), dim=-1)
        return attention.amax(dim=2).sum(dim=1)


def kept_tokens(scores: Tensor, keep: int, prefix: int) -> Tensor:
    """scores [B, N] -> [B, prefix + keep] ascending indices. Prefix tokens always stay; ties go to the earlier."""
    order = torch.argsort(scores[:, prefix:], dim=1, descending=True, stable=True)
    patches = torch.sort(order[:, :keep], dim=1).values + prefix
    head = torch.arange(prefix, device=scores.device).expand(scores.shape[0], prefix)
    return torch.cat([head, patches], dim=1)


def select_tokens(x: Tensor, scores: Tensor, keep: int, prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    """x [B, N, E], scores [B, N] -> x [B, prefix + keep (+ 1), E] and the scores of its tokens.

    The fused token is the mean of the dropped ones weighted by their scores (EViT §3.3), and is scored by their sum.
    """
    index = kept_tokens(scores, keep, prefix)
    kept, kept_scores = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])), scores.gather(1, index)
    if not fuse:
        return kept, kept_scores
    dropped = scores.scatter(1, index, 0.0)
    total = dropped.sum(dim=1, keepdim=True)
    weight = dropped / total.clamp_min(1e-20)
    fused = (weight[..., None].to(x.dtype) * x).sum(dim=1, keepdim=True)
    return torch.cat([kept, fused], dim=1), torch.cat([kept_scores, total], dim=1)
