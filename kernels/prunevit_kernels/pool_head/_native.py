"""pool_head on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import PoolHead


class PackedPoolHead:
    def __init__(self, op: PoolHead, target: Target) -> None:
        self.op, self.target = op, target
        self.linear = None if op.weight is None else cpu.packed_linear(op.weight, op.bias)
        self.norms = cpu.extension().Norms(cpu.vector(op.norm), cpu.vector(op.fc_norm))

    def bind(self, x: Tensor, out: Tensor) -> Launch:
        self.op.check(self.target, x, out)
        native = cpu.extension()
        pooling = native.Pooling.__members__[self.op.pool]
        weights = self.target.pool, self.linear, self.norms
        sizes = cpu.tokens(x), cpu.matrix("out", out)
        launch: Launch = native.pool_head((x, out), *weights, *sizes, pooling, self.op.prefix, self.op.eps)
        return launch


def pack(op: PoolHead, target: Target) -> PackedPoolHead:
    return PackedPoolHead(op, target)
