"""select_tokens on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import SelectTokens


class PackedSelectTokens:
    def __init__(self, op: SelectTokens, target: Target) -> None:
        self.op, self.target = op, target

    def bind(self, x: Tensor, scores: Tensor, kept_x: Tensor, kept_scores: Tensor) -> Launch:
        buffers = (x, scores, kept_x, kept_scores)
        self.op.check(self.target, *buffers)
        sizes = cpu.tokens(x), cpu.matrix("scores", scores), cpu.tokens(kept_x), cpu.matrix("kept_scores", kept_scores)
        rule = self.op.keep, self.op.prefix, self.op.fuse
        launch: Launch = cpu.extension().select_tokens(buffers, self.target.pool, *sizes, *rule)
        return launch


def pack(op: SelectTokens, target: Target) -> PackedSelectTokens:
    return PackedSelectTokens(op, target)
