"""ragged_attention: all heads of a layer, each with its own query-key and value width.

Buffers: qkv [B, N, heads.width] is read, out [B, Nq, heads.out_width] is written for the first Nq ≤ N queries of each
image (the last block under class-token pooling needs only one). The softmax scale times log2 e is folded into q by
whoever packs, so scores are exponents of 2. Alignment gaps after q and k slices hold zeros, those after v slices
anything; gaps of ``out`` are written as zeros. Dqk, Dv ≤ 128; any N ≥ 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._expect import expect, expect_buffer
from ..heads import HeadTable
from ..op import Op
from ..target import Target
from .reference import ragged_attention

__all__ = ["RaggedAttention", "ragged_attention"]


@dataclass(frozen=True, eq=False)
class RaggedAttention(Op):
    heads: HeadTable

    def __post_init__(self) -> None:
        expect(len(self.heads) >= 1, "at least one head", got=len(self.heads))

    def check(self, target: Target, qkv: Tensor, out: Tensor) -> None:
        expect_buffer("qkv", qkv, (None, None, self.heads.width), target)
        expect_buffer("out", out, (qkv.shape[0], None, self.heads.out_width), target)
        expect(
            1 <= out.shape[1] <= qkv.shape[1], "at most as many queries as keys", got=out.shape[1], want=qkv.shape[1]
        )

    def reference(self, qkv: Tensor, out: Tensor) -> None:
        out.copy_(ragged_attention(qkv, self.heads)[:, : out.shape[1]])
