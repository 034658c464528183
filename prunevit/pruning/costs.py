"""What a spec costs in units other than MACs and parameters, for budgets: ``prune(..., cost=...)``.

Latency is measured, and so not here: give any callable that takes a spec and returns a number, such as one that times
the runtime on a device and batch of your choice.
"""

from __future__ import annotations

from ..spec import ViTSpec
from .budget import Cost


def memory(batch: int = 1, itemsize: int = 4) -> Cost:
    """Bytes that inference holds at its peak: all weights, and the most activations alive at once.

    Counted are the residual stream with, in one block, either q, k, v and the heads' outputs or the MLP's hidden layer;
    attention is taken to be computed without its N×N matrix, as the kernels do.
    """

    def cost(spec: ViTSpec) -> float:
        most = (spec.num_patches + spec.num_prefix_tokens) * spec.embed_dim
        for block, (entering, attn, mlp) in zip(spec.blocks, spec.tokens()):
            stream = entering * spec.embed_dim
            most = max(most, stream + attn * (block.qkv_dim + block.v_dim), stream + mlp * block.mlp_dim)
        return float(itemsize * (spec.params() + batch * most))

    return cost
