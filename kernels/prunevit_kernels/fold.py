"""Exact rewrites of a trained model's weights, in fp64, and the ops that come of them, rounded to fp32 once.

Each function says what it uses: LayerNorm's affine part is linear; a softmax row does not see a constant added to all
its scores, and sums to one; a constant added to the residual stream may be added by whoever wrote to it last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .fused_mlp import Activation, FusedMlp
from .heads import HeadTable
from .linear_residual import LinearResidual
from .norm_linear import NormLinear
from .patch_embed import PatchEmbed
from .ragged_attention import RaggedAttention
from .target import Target

LOG2_E = math.log2(math.e)

Channels = Tensor | Sequence[int] | None  # indices into the residual stream; None for all of it


def channels(index: Channels) -> tuple[int, ...] | None:
    if index is None:
        return None
    return tuple(index.tolist() if isinstance(index, Tensor) else index)


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, reads: Channels = None
) -> tuple[Tensor, Tensor]:
    """W (g ⊙ n + β) + b = (W diag g) n + (W β + b), over the channels that W reads."""
    index = None if reads is None else torch.as_tensor(reads, device=weight.device)
    weight = weight.double()
    out = weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
    if norm_bias is not None:
        out = out + weight @ (norm_bias if index is None else norm_bias[index]).double()
    if norm_weight is not None:
        weight = weight * (norm_weight if index is None else norm_weight[index]).double()
    return weight, out


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
    moved = proj.double() @ value_bias
    qkv_bias = torch.cat([qkv_bias[: 2 * qk_dim], torch.zeros_like(value_bias)])
    return qkv_bias, moved if proj_bias is None else moved + proj_bias


def spread(tensor: Tensor, index: Sequence[int], size: int, dim: int = 0) -> Tensor:
    """Put row (or column) i at ``index[i]`` of ``size``; the gaps are zero, so what they compute is defined."""
    if list(index) == list(range(size)):
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_zeros(shape).index_copy(dim, torch.tensor(list(index), device=tensor.device), tensor)


class Sublayer(NamedTuple):
    """Half a block's own tensors: its norm, its first and its last linear (qkv and proj, or fc1 and fc2), layer-scale.

    ``library`` hands them over in this order.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    out_weight: Tensor
    out_bias: Tensor | None
    gamma: Tensor | None = None
    reads: Channels = None
    writes: Channels = None

    def folded(self) -> tuple[Tensor, Tensor]:
        """The first linear with the norm's affine part in it."""
        return fold_norm(self.weight, self.bias, self.norm_weight, self.norm_bias, self.reads)


def attention_ops(
    target: Target, embed_dim: int, heads: HeadTable, scale: float, eps: float | None, half: Sublayer
) -> tuple[NormLinear | LinearResidual, RaggedAttention, LinearResidual]:
    """norm and qkv, the heads, proj and the residual; without an eps, no norm: qkv adds to what is there."""
    qk_dim, proj = sum(heads.qk_dims), half.out_weight
    weight, bias = fold_scale(*half.folded(), qk_dim, scale)
    bias, proj_bias = fold_value_bias(bias, qk_dim, proj, half.out_bias)
    rows = heads.qkv_columns()
    weight, bias = (spread(t, rows, heads.width).float() for t in (weight, bias))
    proj = spread(proj, heads.out_columns(), heads.out_width, dim=1).float()
    qkv: NormLinear | LinearResidual = LinearResidual(heads.width, weight, bias)
    if eps is not None:
        qkv = NormLinear(embed_dim, weight, bias, eps, channels(half.reads))
    out = LinearResidual(embed_dim, proj, proj_bias.float(), _single(half.gamma), channels(half.writes))
    return qkv, RaggedAttention(heads), out


def mlp_op(embed_dim: int, act: Activation, eps: float, half: Sublayer) -> FusedMlp:
    """norm, fc1, activation, fc2 and the residual."""
    w1, b1 = half.folded()
    linears = w1.float(), b1.float(), half.out_weight.float(), _single(half.out_bias)
    reads, writes = channels(half.reads), channels(half.writes)
    return FusedMlp(embed_dim, *linears, act, eps, _single(half.gamma), reads, writes)


def _single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


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
        last_weight, bias = (spread(t, op.writes, op.embed_dim) for t in (last_weight, bias))
    if isinstance(op, FusedMlp):
        return dataclasses.replace(op, w2=last_weight, b2=bias + constant, gamma=None, writes=None)
    return dataclasses.replace(op, weight=last_weight, bias=bias + constant, gamma=None, writes=None)
