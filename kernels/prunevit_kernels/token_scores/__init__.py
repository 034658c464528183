"""token_scores: a second pass over QKᵀ, in the layers that choose tokens only.

Buffers: qkv [B, N, heads.width] is read, scores [B, N] fp32 is written, or added to where ``accumulate`` (the cascade
of CP-ViT accumulates over layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .._expect import expect, expect_buffer
from ..heads import HeadTable
from ..op import Op
from ..target import Target
from .reference import Rule, token_scores

__all__ = ["Rule", "TokenScores", "token_scores"]


@dataclass(frozen=True, eq=False)
class TokenScores(Op):
    heads: HeadTable
    rule: Rule
    accumulate: bool = False

    def __post_init__(self) -> None:
        expect(len(self.heads) >= 1, "at least one head", got=len(self.heads))
        expect(self.rule in get_args(Rule), "a rule", got=self.rule, want=get_args(Rule))

    def queries(self, tokens: int) -> int:
        """How many of an image's ``tokens`` the scores are asked of."""
        return 1 if self.rule == "class_attention" else tokens

    def check(self, target: Target, qkv: Tensor, scores: Tensor) -> None:
        expect_buffer("qkv", qkv, (None, None, self.heads.width), target)
        expect_buffer("scores", scores, qkv.shape[:2], target, torch.float32)

    def reference(self, qkv: Tensor, scores: Tensor) -> None:
        fresh = token_scores(qkv, self.heads, self.rule)
        scores.copy_(scores + fresh if self.accumulate else fresh)
