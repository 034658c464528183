"""A module's own tensors as ops: affine norms and softmax scales folded in fp64, rounded to fp32 once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .fused_mlp import Activation, FusedMlp
from .heads import HeadTable
from .linear_residual import LinearResidual
from .norm_linear import NormLinear
from .ragged_attention import RaggedAttention
from .target import Target


def channels(index: Tensor | None) -> tuple[int, ...] | None:
    return None if index is None else tuple(index.tolist())


def single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32)


def folded(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, reads: Tensor | None
) -> tuple[Tensor, Tensor]:
    """W (g ⊙ n + β) + b = (W diag g) n + (W β + b), in fp64, over the channels that W reads."""
    weight = weight.double()
    out = weight.new_zeros(weight.shape[0]) if bias is None else bias.double()
    if norm_bias is not None:
        out = out + weight @ (norm_bias if reads is None else norm_bias[reads]).double()
    if norm_weight is not None:
        weight = weight * (norm_weight if reads is None else norm_weight[reads]).double()
    return weight, out


def spread(tensor: Tensor, index: Sequence[int], size: int, dim: int) -> Tensor:
    """Row (or column) i at ``index[i]`` of ``size``; the gaps are zero."""
    if list(index) == list(range(size)):
        return tensor
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_zeros(shape).index_copy(dim, torch.tensor(index, device=tensor.device), tensor)


def ragged_qkv(weight: Tensor, bias: Tensor, heads: HeadTable, scale: float) -> tuple[Tensor, Tensor]:
    """[Q | K | V] rows where the head table has them, the query rows times scale · log2 e."""
    queries = sum(heads.qk_dims)
    factor = torch.ones(len(bias), dtype=torch.float64, device=bias.device)
    factor[:queries] = scale * math.log2(math.e)
    rows = heads.qkv_columns()
    weight, bias = weight.double() * factor[:, None], bias * factor
    return spread(weight, rows, heads.width, 0).float(), spread(bias, rows, heads.width, 0).float()


def attention_ops(
    target: Target,
    embed_dim: int,
    qk_dims: Sequence[int],
    v_dims: Sequence[int],
    scale: float,
    eps: float | None,
    weights: Sequence[Tensor | None],
) -> tuple[NormLinear | LinearResidual, RaggedAttention, LinearResidual]:
    """norm, qkv and proj of ``weights`` (in ``library.attention_sublayer``'s order); without an eps, no norm."""
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, reads, writes = weights
    assert qkv_weight is not None
    assert proj_weight is not None
    heads = HeadTable.packed(qk_dims, v_dims, align=target.alignment)
    weight, bias = folded(qkv_weight, qkv_bias, norm_weight, norm_bias, reads)
    weight, bias = ragged_qkv(weight, bias, heads, scale)
    proj = spread(proj_weight, heads.out_columns(), heads.out_width, 1).float()
    qkv: NormLinear | LinearResidual = LinearResidual(heads.width, weight, bias)
    if eps is not None:
        qkv = NormLinear(embed_dim, weight, bias, eps, channels(reads))
    return (
        qkv,
        RaggedAttention(heads),
        LinearResidual(embed_dim, proj, single(proj_bias), single(gamma), channels(writes)),
    )


def mlp_op(embed_dim: int, act: Activation, eps: float, weights: Sequence[Tensor | None]) -> FusedMlp:
    """norm, fc1, activation and fc2 of ``weights`` (in ``library.mlp_sublayer``'s order)."""
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, reads, writes = weights
    assert fc1_weight is not None
    assert fc2_weight is not None
    w1, b1 = folded(fc1_weight, fc1_bias, norm_weight, norm_bias, reads)
    linears = (w1.float(), b1.float(), fc2_weight.float(), single(fc2_bias))
    return FusedMlp(embed_dim, *linears, act, eps, single(gamma), channels(reads), channels(writes))
