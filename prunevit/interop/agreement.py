"""How far what became of a model may be from it."""

from __future__ import annotations

from torch import Tensor

TOLERANCE = 1e-3  # of the largest logit: the same as between a module and its runtime


def largest_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
