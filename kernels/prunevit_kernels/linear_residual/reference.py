"""x ← x + γ (c Wᵀ + b)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def linear_residual(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None = None,
    writes: Sequence[int] | None = None,
) -> Tensor:
    """x [..., E], c [..., K], weight [E or len(writes), K], bias and gamma as many rows -> [..., E]."""
    update = F.linear(c, weight, bias)
    if gamma is not None:
        update = gamma * update
    if writes is None:
        return x + update
    out = x.clone()
    out[..., list(writes)] += update
    return out
