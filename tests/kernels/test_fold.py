"""Folds are exact: what a folded linear computes is what the unfolded parts compute, to fp64 rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from prunevit_kernels import FusedMlp, HeadTable, LinearResidual, PatchEmbed
from prunevit_kernels.fold import add_constant, fold_norm, fold_scale, fold_value_bias, spread
from prunevit_kernels.fused_mlp import fused_mlp
from prunevit_kernels.linear_residual import linear_residual
from prunevit_kernels.patch_embed import patch_embed
from prunevit_kernels.ragged_attention import ragged_attention


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) + 0.5


@pytest.mark.parametrize("reads", [None, (0, 2, 9)], ids=["all_channels", "three_channels"])
def test_a_norms_affine_part_moves_into_the_linear(reads: tuple[int, ...] | None) -> None:
    x, g, beta = rand(4, 10), rand(10), rand(10)
    weight, bias = rand(6, 10 if reads is None else len(reads)), rand(6)
    normed = F.layer_norm(x, (10,), g, beta)
    want = F.linear(normed if reads is None else normed[:, list(reads)], weight, bias)
    folded, folded_bias = fold_norm(weight, bias, g, beta, reads)
    plain = F.layer_norm(x, (10,))
    got = F.linear(plain if reads is None else plain[:, list(reads)], folded, folded_bias)
    torch.testing.assert_close(got, want)


def test_scale_key_bias_and_value_bias_fold_away() -> None:
    qk_dims, v_dims, scale = (5, 3), (4, 7), 0.125
    heads = HeadTable.packed(qk_dims, v_dims)
    x, weight, bias = rand(2, 6, 10), rand(heads.width, 10), rand(heads.width)
    proj, proj_bias = rand(10, heads.out_width), rand(10)

    packed = F.linear(x, weight, bias)
    context = []
    for h in range(2):
        q, k = (packed[..., o[h] : o[h] + qk_dims[h]] for o in (heads.q, heads.k))
        v = packed[..., heads.v[h] : heads.v[h] + v_dims[h]]
        context.append(torch.softmax(q @ k.transpose(1, 2) * scale, dim=-1) @ v)
    want = F.linear(torch.cat(context, dim=-1), proj, proj_bias)

    folded, folded_bias = fold_scale(weight, bias, sum(qk_dims), scale)
    folded_bias, new_proj_bias = fold_value_bias(folded_bias, sum(qk_dims), proj, proj_bias)
    assert folded_bias[sum(qk_dims) :].abs().max() == 0  # neither keys nor values have one any more
    got = F.linear(ragged_attention(F.linear(x, folded, folded_bias), heads), proj, new_proj_bias)
    torch.testing.assert_close(got, want)


def test_aligned_slices_compute_the_same_and_their_gaps_are_zero() -> None:
    heads, tight = HeadTable.packed((5, 3), (4, 7), align=8), HeadTable.packed((5, 3), (4, 7))
    assert [offset % 8 for offset in (*heads.q, *heads.k, *heads.v, *heads.o)] == [0] * 8
    x, weight, bias, proj = rand(2, 6, 10), rand(tight.width, 10), rand(tight.width), rand(10, tight.out_width)
    rows = heads.qkv_columns()
    packed = F.linear(x, spread(weight, rows, heads.width), spread(bias, rows, heads.width))
    gaps = sorted(set(range(heads.width)) - set(heads.qkv_columns()))
    assert packed[..., gaps].abs().max() == 0
    want = ragged_attention(F.linear(x, weight, bias), tight) @ proj.T
    got = ragged_attention(packed, heads) @ spread(proj, heads.out_columns(), heads.out_width, dim=1).T
    torch.testing.assert_close(got, want)


def single(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) + 0.5


@pytest.mark.parametrize("gamma", [False, True], ids=["no_layer_scale", "layer_scale"])
@pytest.mark.parametrize("writes", [None, (1, 4)], ids=["all_channels", "two_channels"])
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
def test_a_constant_joins_whoever_wrote_last(gamma: bool, writes: tuple[int, ...] | None, bias: bool) -> None:
    rows = 6 if writes is None else len(writes)
    x, c, constant = single(3, 6), single(3, 5), single(6)
    scale = torch.full((rows,), 1e-6) if gamma else None
    linear = LinearResidual(6, single(rows, 5), single(rows) if bias else None, scale, writes)
    mlp = FusedMlp(6, single(5, 6), None, linear.weight, linear.bias, "gelu", 1e-6, scale, None, writes)

    folded = add_constant(linear, constant)
    want = linear_residual(x, c, linear.weight, linear.bias, scale, writes) + constant
    torch.testing.assert_close(linear_residual(x, c, folded.weight, folded.bias), want)

    folded_mlp = add_constant(mlp, constant)
    want = fused_mlp(x, mlp.w1, None, mlp.w2, mlp.b2, "gelu", 1e-6, scale, None, writes) + constant
    torch.testing.assert_close(fused_mlp(x, folded_mlp.w1, None, folded_mlp.w2, folded_mlp.b2, "gelu", 1e-6), want)


@pytest.mark.parametrize("pre_norm", [False, True], ids=["plain", "pre_norm"])
def test_a_constant_joins_the_stem(pre_norm: bool) -> None:
    norm = single(2, 6) if pre_norm else None
    stem = PatchEmbed(single(6, 3, 2, 2), None, single(4, 6), single(1, 6), 1e-6, pre_norm=norm)
    images, constant = single(2, 3, 4, 4), single(6)

    def run(op: PatchEmbed) -> torch.Tensor:
        return patch_embed(images, op.weight, op.bias, op.positions, op.prefix, op.eps, None, op.pre_norm)

    torch.testing.assert_close(run(add_constant(stem, constant)), run(stem) + constant)
