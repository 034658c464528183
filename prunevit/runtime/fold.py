"""Exact rewrites of a trained model's weights, in fp64, before any layout is chosen.

Each function says what it uses: LayerNorm's affine part is linear; a softmax row does not see a constant added to all
its scores, and sums to one; a constant added to the residual stream may be added by whoever wrote to it last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunevit_kernels import FusedMlp, LinearResidual, PatchEmbed

LOG2_E = math.log2(math.e)


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor, reads: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """W (g ⊙ n + β) + b = (W diag g) n + (W β + b), over the channels that W reads."""
    if reads is not None:
        norm_weight, norm_bias = norm_weight[list(reads)], norm_bias[list(reads)]
    folded_bias = weight @ norm_bias
    if bias is not None:
        folded_bias = folded_bias + bias
    return weight * norm_weight, folded_bias


def fold_scale(weight: Tensor, bias: Tensor, qk_dim: int, attn_scale: float) -> tuple[Tensor, Tensor]:
    """Multiply the query rows of [Q | K | V] by scale · log2 e, and drop the key bias.

    q·(k + b) = q·k + q·b: the second term is the same for every key, so the softmax does not see it.
    """
    weight, bias = weight.clone(), bias.clone()
    weight[:qk_dim] *= attn_scale * LOG2_E
    bias[:qk_dim] *= attn_scale * LOG2_E
    bias[qk_dim : 2 * qk_dim] = 0
    return weight, bias


def fold_value_bias(qkv_bias: Tensor, qk_dim: int, proj: Tensor, proj_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """A softmax row sums to one, so the value bias passes through it unchanged: W_o (P v + b_v) = W_o P v + W_o b_v."""
    value_bias = qkv_bias[2 * qk_dim :]
    moved = proj @ value_bias
    qkv_bias = torch.cat([qkv_bias[: 2 * qk_dim], torch.zeros_like(value_bias)])
    return qkv_bias, moved if proj_bias is None else moved + proj_bias


def spread_rows(weight: Tensor, bias: Tensor, index: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
    """Put row i of a linear at ``index[i]`` of ``rows`` rows; the gaps are zero, so what they compute is defined."""
    spread, spread_bias = weight.new_zeros(rows, weight.shape[1]), bias.new_zeros(rows)
    spread[list(index)], spread_bias[list(index)] = weight, bias
    return spread, spread_bias


def spread_columns(weight: Tensor, index: Sequence[int], columns: int) -> Tensor:
    """Put column i of a weight at ``index[i]`` of ``columns`` columns; the gaps are zero."""
    spread = weight.new_zeros(weight.shape[0], columns)
    spread[:, list(index)] = weight
    return spread


def add_constant(
    op: PatchEmbed | LinearResidual | FusedMlp, constant: Tensor
) -> PatchEmbed | LinearResidual | FusedMlp:
    """The op that writes what ``op`` writes plus ``constant`` [E]: how an emptied sublayer's bias is folded away.

    A layer-scale on the way is multiplied into that op's weights: the constant is not its to scale.
    """
    constant = constant.to(torch.float32)
    if isinstance(op, PatchEmbed):
        if op.pre_norm is not None:
            weight, bias = op.pre_norm
            return dataclasses.replace(op, pre_norm=torch.stack([weight, bias + constant]))
        return dataclasses.replace(op, positions=op.positions + constant, prefix=op.prefix + constant)
    last_weight, last_bias = (op.w2, op.b2) if isinstance(op, FusedMlp) else (op.weight, op.bias)
    bias = torch.zeros_like(last_weight[:, 0]) if last_bias is None else last_bias
    if op.gamma is not None:
        last_weight, bias = op.gamma[:, None] * last_weight, op.gamma * bias
    if op.writes is not None:
        last_weight, bias = spread_rows(last_weight, bias, op.writes, op.embed_dim)
    if isinstance(op, FusedMlp):
        return dataclasses.replace(op, w2=last_weight, b2=bias + constant, gamma=None, writes=None)
    return dataclasses.replace(op, weight=last_weight, bias=bias + constant, gamma=None, writes=None)
