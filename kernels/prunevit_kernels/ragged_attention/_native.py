"""ragged_attention on the CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cpu
from . import RaggedAttention


class Packed(cpu.NativeOp[RaggedAttention]):
    name = "ragged_attention"

    def arguments(self, qkv: Tensor, out: Tensor) -> tuple[Any, ...]:
        return cpu.head_tuples(self.op.heads), cpu.tokens(qkv), cpu.tokens(out)
