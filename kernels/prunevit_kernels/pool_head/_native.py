"""pool_head on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from ..target import Target
from . import PoolHead


class Packed(cpu.NativeOp[PoolHead]):
    name = "pool_head"

    def __init__(self, op: PoolHead, target: Target) -> None:
        super().__init__(op, target)
        self.linear = None if op.weight is None else cpu.packed_linear(op.weight, op.bias)
        self.norms = cpu.extension().Norms(cpu.vector(op.norm), cpu.vector(op.fc_norm))

    def arguments(self, x: Tensor, out: Tensor) -> tuple[Any, ...]:
        pooling = cpu.extension().Pooling.__members__[self.op.pool]
        sizes = cpu.tokens(x), cpu.matrix("out", out)
        return self.linear, self.norms, *sizes, pooling, self.op.prefix, self.op.eps
