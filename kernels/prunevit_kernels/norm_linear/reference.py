"""y = LN(x) Wᵀ + b."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def norm_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, reads: Sequence[int] | None = None
) -> Tensor:
    """x [..., E], weight [D, E or len(reads)], bias [D] -> [..., D]. Statistics are over all E channels."""
    normed = F.layer_norm(x, x.shape[-1:], eps=eps)
    if reads is not None:
        normed = normed[..., list(reads)]
    return F.linear(normed, weight, bias)
