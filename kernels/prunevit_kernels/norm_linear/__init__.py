"""norm_linear: LayerNorm without affine, then a linear map.

Buffers: x [B, N, E] is read, y [B, N, D] is written. Rows may have a pitch; nothing past column D is touched.
The norm's own weight and bias are folded into the linear by whoever packs. ``reads`` names the channels that the
linear reads; the statistics are over all E.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._expect import expect_buffer, expect_channels, expect_linear
from ..op import Op
from ..target import Target
from .reference import norm_linear

__all__ = ["NormLinear", "norm_linear"]


@dataclass(frozen=True, eq=False)
class NormLinear(Op):
    """weight [D, E or len(reads)], bias [D] or None, both fp32; ``embed_dim`` is E."""

    embed_dim: int
    weight: Tensor
    bias: Tensor | None
    eps: float
    reads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        in_dim = expect_channels("reads", self.reads, self.embed_dim)
        expect_linear("weight", self.weight, self.bias, (None, in_dim))

    @property
    def out_dim(self) -> int:
        return self.weight.shape[0]

    def check(self, target: Target, x: Tensor, y: Tensor) -> None:
        expect_buffer("x", x, (None, None, self.embed_dim), target)
        expect_buffer("y", y, (*x.shape[:2], self.out_dim), target)

    def reference(self, x: Tensor, y: Tensor) -> None:
        y.copy_(norm_linear(x, self.weight, self.bias, self.eps, self.reads))
