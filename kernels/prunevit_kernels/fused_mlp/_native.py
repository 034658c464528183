"""fused_mlp on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from ..target import Target
from . import FusedMlp

# Hidden columns that are computed, activated and consumed before the next: 100 rows of them are 100 KB.
CHUNK = 256


class Packed(cpu.NativeOp[FusedMlp]):
    name = "fused_mlp"

    def __init__(self, op: FusedMlp, target: Target) -> None:
        super().__init__(op, target)
        self.fc1 = cpu.packed_linear(op.w1, op.b1, reads=op.reads)
        blocks = self.fc1.column_blocks(CHUNK)
        self.fc2 = cpu.packed_linear(op.w2, op.b2, op.gamma, writes=op.writes, k_start=blocks)

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        act = cpu.extension().Activation.__members__[self.op.act]
        return self.fc1, self.fc2, cpu.matrix("x", x), act, self.op.eps
