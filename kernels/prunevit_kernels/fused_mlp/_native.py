"""fused_mlp on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import FusedMlp

# Hidden columns that are computed, activated and consumed before the next: 100 rows of them are 100 KB.
CHUNK = 256


class PackedFusedMlp:
    def __init__(self, op: FusedMlp, target: Target) -> None:
        self.op, self.target = op, target
        self.fc1 = cpu.packed_linear(op.w1, op.b1, reads=op.reads)
        blocks = self.fc1.column_blocks(CHUNK)
        self.fc2 = cpu.packed_linear(op.w2, op.b2, op.gamma, writes=op.writes, k_start=blocks)

    def bind(self, x: Tensor) -> Launch:
        self.op.check(self.target, x)
        native = cpu.extension()
        linears = (self.target.pool, self.fc1, self.fc2)
        act = native.Activation.__members__[self.op.act]
        launch: Launch = native.fused_mlp(x, *linears, cpu.matrix("x", x), act, self.op.eps)
        return launch


def pack(op: FusedMlp, target: Target) -> PackedFusedMlp:
    return PackedFusedMlp(op, target)
