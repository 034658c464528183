"""token_scores on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import TokenScores


class PackedTokenScores:
    def __init__(self, op: TokenScores, target: Target) -> None:
        self.op, self.target = op, target
        self.heads = cpu.head_tuples(op.heads)

    def bind(self, qkv: Tensor, scores: Tensor) -> Launch:
        self.op.check(self.target, qkv, scores)
        native = cpu.extension()
        sizes = cpu.tokens(qkv), cpu.matrix("scores", scores)
        rule = native.Rule.__members__[self.op.rule], self.op.accumulate
        launch: Launch = native.token_scores((qkv, scores), self.target.pool, self.heads, *sizes, *rule)
        return launch


def pack(op: TokenScores, target: Target) -> PackedTokenScores:
    return PackedTokenScores(op, target)
