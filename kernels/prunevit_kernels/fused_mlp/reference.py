"""x ← x + γ (act(LN(x) W1ᵀ + b1) W2ᵀ + b2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linear_residual.reference import linear_residual
from ..norm_linear.reference import norm_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
}


def fused_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str,
    eps: float,
    gamma: Tensor | None = None,
    reads: Sequence[int] | None = None,
    writes: Sequence[int] | None = None,
) -> Tensor:
    """x [..., E], w1 [F, E or len(reads)], w2 [E or len(writes), F] -> [..., E]."""
    hidden = ACTIVATIONS[act](norm_linear(x, w1, b1, eps, reads))
    return linear_residual(x, hidden, w2, b2, gamma, writes)
