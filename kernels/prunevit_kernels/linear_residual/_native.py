"""linear_residual on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import LinearResidual


class PackedLinearResidual:
    def __init__(self, op: LinearResidual, target: Target) -> None:
        self.op, self.target = op, target
        self.linear = cpu.packed_linear(op.weight, op.bias, op.gamma, writes=op.writes)

    def bind(self, c: Tensor, x: Tensor) -> Launch:
        self.op.check(self.target, c, x)
        sizes = cpu.matrix("c", c), cpu.matrix("x", x)
        launch: Launch = cpu.extension().linear_residual((c, x), self.target.pool, self.linear, *sizes)
        return launch


def pack(op: LinearResidual, target: Target) -> PackedLinearResidual:
    return PackedLinearResidual(op, target)
