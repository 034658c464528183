"""token_scores on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from . import TokenScores


class Packed(cpu.NativeOp[TokenScores]):
    name = "token_scores"

    def arguments(self, qkv: Tensor, scores: Tensor) -> tuple[Any, ...]:
        rule = cpu.extension().Rule.__members__[self.op.rule]
        sizes = cpu.tokens(qkv), cpu.matrix("scores", scores)
        return cpu.head_tuples(self.op.heads), *sizes, rule, self.op.accumulate
