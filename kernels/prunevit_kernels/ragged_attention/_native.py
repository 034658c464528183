"""ragged_attention on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import RaggedAttention


class PackedRaggedAttention:
    def __init__(self, op: RaggedAttention, target: Target) -> None:
        self.op, self.target = op, target
        self.heads = cpu.head_tuples(op.heads)

    def bind(self, qkv: Tensor, out: Tensor) -> Launch:
        self.op.check(self.target, qkv, out)
        native = cpu.extension()
        sizes = cpu.tokens(qkv), cpu.tokens(out)
        launch: Launch = native.ragged_attention((qkv, out), self.target.pool, self.heads, *sizes)
        return launch


def pack(op: RaggedAttention, target: Target) -> PackedRaggedAttention:
    return PackedRaggedAttention(op, target)
