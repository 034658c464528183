"""linear_residual: a linear map added to the residual stream.

Buffers: c [B, N, K] is read, x [B, N, E] is updated in place. Rows may have a pitch; nothing past column E is touched.
Layer-scale γ stays a vector of its own: folded into 16-bit weights, a γ of 1e-6 loses most of them. ``writes`` names
the channels of x that are updated; weight, bias and γ have one row for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._expect import expect_buffer, expect_channels, expect_linear, expect_vector
from ..op import Op
from ..target import Target
from .reference import linear_residual

__all__ = ["LinearResidual", "linear_residual"]


@dataclass(frozen=True, eq=False)
class LinearResidual(Op):
    """weight [E or len(writes), K], bias and gamma as many or None, all fp32; ``embed_dim`` is E."""

    embed_dim: int
    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None = None
    writes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        out_dim = expect_channels("writes", self.writes, self.embed_dim)
        expect_linear("weight", self.weight, self.bias, (out_dim, None))
        expect_vector("gamma", self.gamma, out_dim)

    @property
    def in_dim(self) -> int:
        return self.weight.shape[1]

    def check(self, target: Target, c: Tensor, x: Tensor) -> None:
        expect_buffer("c", c, (None, None, self.in_dim), target)
        expect_buffer("x", x, (*c.shape[:2], self.embed_dim), target)

    def reference(self, c: Tensor, x: Tensor) -> None:
        x.copy_(linear_residual(x, c, self.weight, self.bias, self.gamma, self.writes))
