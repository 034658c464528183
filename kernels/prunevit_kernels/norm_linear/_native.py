"""norm_linear on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from ..target import Target
from . import NormLinear


class Packed(cpu.NativeOp[NormLinear]):
    name = "norm_linear"

    def __init__(self, op: NormLinear, target: Target) -> None:
        super().__init__(op, target)
        self.linear = cpu.packed_linear(op.weight, op.bias, reads=op.reads)

    def arguments(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
        return self.linear, cpu.matrix("x", x), cpu.matrix("y", y), self.op.eps
