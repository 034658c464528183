"""linear_residual on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from ..target import Target
from . import LinearResidual


class Packed(cpu.NativeOp[LinearResidual]):
    name = "linear_residual"

    def __init__(self, op: LinearResidual, target: Target) -> None:
        super().__init__(op, target)
        self.linear = cpu.packed_linear(op.weight, op.bias, op.gamma, writes=op.writes)

    def arguments(self, c: Tensor, x: Tensor) -> tuple[Any, ...]:
        return self.linear, cpu.matrix("c", c), cpu.matrix("x", x)
