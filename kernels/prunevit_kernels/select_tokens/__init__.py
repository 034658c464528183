"""select_tokens: token reduction to a static count.

Buffers: x [B, N, E] and scores [B, N] fp32 are read; kept_x [B, M, E] and kept_scores [B, M] fp32 are written, with
M = prefix + keep, one more when the dropped tokens are fused into one. The outputs overlap none of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .._expect import expect, expect_buffer
from ..op import Op
from ..target import Target
from .reference import kept_tokens, select_tokens

__all__ = ["SelectTokens", "kept_tokens", "select_tokens"]


@dataclass(frozen=True, eq=False)
class SelectTokens(Op):
    """``keep`` patch tokens stay beside ``prefix`` class and register tokens."""

    embed_dim: int
    keep: int
    prefix: int
    fuse: bool = False

    def __post_init__(self) -> None:
        expect(self.keep >= 1, "at least one token kept", got=self.keep)
        expect(self.prefix >= 0, "a count of prefix tokens", got=self.prefix)

    @property
    def out_tokens(self) -> int:
        return self.prefix + self.keep + int(self.fuse)

    def check(self, target: Target, x: Tensor, scores: Tensor, kept_x: Tensor, kept_scores: Tensor) -> None:
        expect_buffer("x", x, (None, None, self.embed_dim), target)
        b, n = x.shape[:2]
        expect(self.prefix + self.keep <= n, "no more tokens kept than there are", got=self.prefix + self.keep, want=n)
        expect_buffer("scores", scores, (b, n), target, torch.float32)
        expect_buffer("kept_x", kept_x, (b, self.out_tokens, self.embed_dim), target)
        expect_buffer("kept_scores", kept_scores, (b, self.out_tokens), target, torch.float32)

    def reference(self, x: Tensor, scores: Tensor, kept_x: Tensor, kept_scores: Tensor) -> None:
        tokens, token_scores = select_tokens(x, scores, self.keep, self.prefix, self.fuse)
        kept_x.copy_(tokens)
        kept_scores.copy_(token_scores)
