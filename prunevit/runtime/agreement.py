"""How far what computes the same as a model, or what became of one, may be from it."""

from __future__ import annotations

from torch import Tensor

# What exact folds in fp64 and another order of fp32 sums may differ by, as a share of the logits' own spread. Measured
# over the published shapes: below 2e-5.
TOLERANCE = 1e-3


def largest_error(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
