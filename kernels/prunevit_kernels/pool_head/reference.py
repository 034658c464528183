"""Tokens to logits: norm, pool, norm, linear."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pool = Literal["token", "tokens", "avg", "max", "avgmax", "none"]


def pool_tokens(x: Tensor, pool: Pool, prefix: int) -> Tensor:
    """x [B, N, E] -> [B, E]; ``tokens``: the first two side by side [B, 2E]; ``none``: all [B, N, E].

    avg and max leave the first ``prefix`` tokens out.
    """
    patches = x[:, prefix:]
    if pool == "token":
        return x[:, 0]
    if pool == "tokens":
        return torch.cat([x[:, 0], x[:, 1]], dim=-1)
    if pool == "avg":
        return patches.mean(dim=1)
    if pool == "max":
        return patches.amax(dim=1)
    if pool == "avgmax":
        return 0.5 * (patches.amax(dim=1) + patches.mean(dim=1))
    return x


def pool_head(
    x: Tensor,
    pool: Pool,
    prefix: int,
    eps: float,
    norm: Tensor | None = None,
    fc_norm: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x [B, N, E] -> logits [B, classes], or pooled features where there is no weight. A norm is [2, E]."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm[0], norm[1], eps)
    pooled = pool_tokens(x, pool, prefix)
    if fc_norm is not None:
        pooled = F.layer_norm(pooled, x.shape[-1:], fc_norm[0], fc_norm[1], eps)
    return pooled if weight is None else F.linear(pooled, weight, bias)
