"""fused_mlp: the second half of a block, in one op.

Buffer: x [B, N, E] is updated in place. Rows may have a pitch; nothing past column E is touched. Kernels
that are one launch keep the hidden activations [B, N, F] on chip; those of two launches pass them through memory once.
The norm's own weight and bias are folded into w1 and b1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from .._expect import expect, expect_buffer, expect_channels, expect_linear, expect_vector
from ..op import Op
from ..target import PackedOp, Target
from .reference import fused_mlp

__all__ = ["Activation", "FusedMlp", "fused_mlp"]

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]


@dataclass(frozen=True, eq=False)
class FusedMlp(Op):
    """w1 [F, E or len(reads)], b1 [F], w2 [E or len(writes), F], b2 and gamma [E or len(writes)]; F ≥ 1; fp32."""

    embed_dim: int
    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    act: Activation
    eps: float
    gamma: Tensor | None = None
    reads: tuple[int, ...] | None = None
    writes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        expect(self.act in get_args(Activation), "an activation", got=self.act, want=get_args(Activation))
        in_dim = expect_channels("reads", self.reads, self.embed_dim)
        out_dim = expect_channels("writes", self.writes, self.embed_dim)
        expect_linear("w1", self.w1, self.b1, (None, in_dim))
        expect_linear("w2", self.w2, self.b2, (out_dim, self.hidden_dim))
        expect_vector("gamma", self.gamma, out_dim)

    @property
    def hidden_dim(self) -> int:
        return self.w1.shape[0]

    def check(self, target: Target, x: Tensor) -> None:
        expect_buffer("x", x, (None, None, self.embed_dim), target)

    def pack(self, target: Target) -> PackedOp:
        """On a GPU there are several kernels to choose from, Triton's among them."""
        if target.backend != "cuda":
            return super().pack(target)
        from ._cuda import pack

        return pack(self, target)

    def reference(self, x: Tensor) -> None:
        linears = (self.w1, self.b1, self.w2, self.b2)
        x.copy_(fused_mlp(x, *linears, self.act, self.eps, self.gamma, self.reads, self.writes))
