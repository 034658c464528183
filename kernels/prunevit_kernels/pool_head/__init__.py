"""pool_head: the end of the model.

Buffers: x [B, N, E] is read, out is written: [B, classes], or the pooled features [B, E] ([B, N, E] where ``pool`` is
"none") of a model with no classifier. ``norm`` precedes pooling and ``fc_norm`` follows it, as one tensor [2, E] each.
A distilled model's two heads are one linear over its two first tokens side by side (``pool`` "tokens"), each head's
weight halved, since their logits are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from .._expect import expect, expect_affine, expect_buffer, expect_linear
from ..op import Op
from ..target import Target
from .reference import Pool, pool_head, pool_tokens

__all__ = ["Pool", "PoolHead", "pool_head", "pool_tokens"]


@dataclass(frozen=True, eq=False)
class PoolHead(Op):
    """norm and fc_norm [2, E] or None; weight [classes, E or 2E] or None, bias [classes] or None; fp32."""

    embed_dim: int
    pool: Pool
    prefix: int
    eps: float
    norm: Tensor | None = None
    fc_norm: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        expect(self.pool in get_args(Pool), "a kind of pooling", got=self.pool, want=get_args(Pool))
        expect(self.prefix >= 0, "a count of prefix tokens", got=self.prefix)
        expect_affine("norm", self.norm, self.embed_dim)
        expect_affine("fc_norm", self.fc_norm, self.embed_dim)
        expect(self.pool != "tokens" or self.fc_norm is None, "no norm after pooling two tokens", got="fc_norm")
        if self.weight is not None:
            expect_linear("weight", self.weight, self.bias, (None, self.pooled_dim))

    @property
    def pooled_dim(self) -> int:
        return 2 * self.embed_dim if self.pool == "tokens" else self.embed_dim

    def check(self, target: Target, x: Tensor, out: Tensor) -> None:
        expect_buffer("x", x, (None, None, self.embed_dim), target)
        b, n = x.shape[:2]
        left_out = self.prefix if self.pool in ("avg", "max", "avgmax") else 0
        expect(left_out < n, "at least one token to pool", got=n - left_out)
        expect(self.pool != "tokens" or n >= 2, "two tokens to pool", got=n)
        out_dim = self.pooled_dim if self.weight is None else self.weight.shape[0]
        expect_buffer("out", out, (b, n, out_dim) if self.pool == "none" else (b, out_dim), target)

    def reference(self, x: Tensor, out: Tensor) -> None:
        norms = self.norm, self.fc_norm
        out.copy_(pool_head(x, self.pool, self.prefix, self.eps, *norms, self.weight, self.bias))
