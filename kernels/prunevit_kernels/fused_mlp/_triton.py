"""fused_mlp on NVIDIA GPUs in two launches: the hidden activations go through memory once.

This serves where the CUDA extension is not built, and where tuning found it the fastest.
"""

from __future__ import annotations

from torch import Tensor

from .._launch import Call, TritonOp, expect_rows, scratch_for
from .._linear import PackedLinear
from ..linear_residual._triton import ResidualLinear
from ..norm_linear._triton import linear_call
from ..target import Target
from . import FusedMlp


class Packed(TritonOp[FusedMlp]):
    def __init__(self, op: FusedMlp, target: Target) -> None:
        super().__init__(op, target)
        self.fc1 = PackedLinear(op.w1, op.b1, target.device, target.dtype, op.embed_dim, op.reads)
        self.fc2 = ResidualLinear(target, op.w2, op.b2, op.gamma, op.writes)

    def calls(self, x: Tensor) -> list[Call]:
        expect_rows("x", x)
        hidden = scratch_for(x, (*x.shape[:2], self.op.hidden_dim), x.dtype)
        fc1 = linear_call(x, hidden, self.fc1, self.target, self.op.eps, self.op.act)
        return [fc1, self.fc2.call(hidden, x, self.target)]
