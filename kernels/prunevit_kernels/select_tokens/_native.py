"""select_tokens on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from . import SelectTokens


class Packed(cpu.NativeOp[SelectTokens]):
    name = "select_tokens"

    def arguments(self, x: Tensor, scores: Tensor, kept_x: Tensor, kept_scores: Tensor) -> tuple[Any, ...]:
        sizes = cpu.tokens(x), cpu.matrix("scores", scores), cpu.tokens(kept_x), cpu.matrix("kept_scores", kept_scores)
        return *sizes, self.op.keep, self.op.prefix, self.op.fuse
