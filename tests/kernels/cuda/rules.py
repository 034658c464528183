"""What a fused MLP's result is held to, in an emulator or on a GPU.

Two rules. The project's: as good as eager, both against fp64. And a closer one, since a residual of mean 3 leaves the
first room to hide a lost hidden unit in: against fp64 with the two roundings that any such kernel makes (LN's output
and the activations), little but the rounding of the result is allowed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from prunevit_kernels import FusedMlp
from prunevit_kernels.fused_mlp.reference import ACTIVATIONS
from tests.kernels.half_precision import assert_as_good_as_eager, changed


def mirrored(op: FusedMlp, x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 but for the values that a kernel keeps in 16 bits."""
    normed = F.layer_norm(x, x.shape[-1:], eps=op.eps).to(dtype).double()
    normed = normed if op.reads is None else normed[..., list(op.reads)]
    hidden = ACTIVATIONS[op.act](F.linear(normed, op.w1, op.b1)).to(dtype).double()
    update = F.linear(hidden, op.w2, op.b2) * (1 if op.gamma is None else op.gamma)
    out = x.clone()
    out[..., list(op.writes or range(op.embed_dim))] += update
    return out


def assert_right(ours: Tensor, op: FusedMlp, values: Tensor) -> None:
    """``ours`` is what ``op``, in fp64 with weights that 16 bits hold, makes of ``values``."""
    dtype = values.dtype
    truth, eager = values.double(), values.clone()
    with torch.no_grad():
        op.reference(truth)
        changed(op, lambda weight: weight.to(dtype)).reference(eager)
    assert_as_good_as_eager(ours.double(), eager.double(), truth, dtype)
    eps = torch.finfo(dtype).eps
    near = mirrored(op, values.double(), dtype)
    excess = (ours.double() - near).abs() - 0.51 * eps * near.abs()
    # a value that lies near the middle of two 16-bit ones may round either way: activations are of order one
    assert excess.max().item() <= 2 * eps, f"off by {excess.max().item():.3g} more than rounding explains"
