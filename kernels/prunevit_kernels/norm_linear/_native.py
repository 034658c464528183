"""norm_linear on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import NormLinear


class PackedNormLinear:
    def __init__(self, op: NormLinear, target: Target) -> None:
        self.op, self.target = op, target
        self.linear = cpu.packed_linear(op.weight, op.bias, reads=op.reads)

    def bind(self, x: Tensor, y: Tensor) -> Launch:
        self.op.check(self.target, x, y)
        sizes = cpu.matrix("x", x), cpu.matrix("y", y)
        launch: Launch = cpu.extension().norm_linear((x, y), self.target.pool, self.linear, *sizes, self.op.eps)
        return launch


def pack(op: NormLinear, target: Target) -> PackedNormLinear:
    return PackedNormLinear(op, target)
