"""Weights → ops: each part of a model as the op that runs it, exact folds made, laid out for a target.

All arithmetic is in fp64 and rounded to fp32 once; casting to the target's dtype is the op's own last step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from prunevit_kernels import (
    FusedMlp,
    HeadTable,
    LinearResidual,
    NormLinear,
    PatchEmbed,
    PoolHead,
    RaggedAttention,
    Target,
    fold,
)
from prunevit_kernels.fold import Sublayer, fold_norm, spread

from ..spec import ViTSpec
from .walk import pooling


class Weights:
    """A model's tensors by timm's names, in fp64; an absent one is None. On the device meta, their shapes."""

    def __init__(self, tensors: Mapping[str, Tensor], device: str = "cpu") -> None:
        self._tensors, self._device = tensors, device

    def get(self, name: str) -> Tensor | None:
        tensor = self._tensors.get(name)
        return None if tensor is None else tensor.detach().to(self._device, torch.float64)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].detach().to(self._device, torch.float64)

    def affine(self, norm: str) -> Tensor:
        """A norm's weight and bias as one tensor [2, E]."""
        return torch.stack([self[f"{norm}.weight"], self[f"{norm}.bias"]])


def _single(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def patch_embed_op(spec: ViTSpec, weights: Weights, grid: tuple[int, int]) -> PatchEmbed:
    """The stem for a grid of patches; positions learnt at another grid are resampled as timm resamples them."""
    with_prefix = 0 if spec.no_embed_class else spec.num_prefix_tokens
    positions = weights["pos_embed"]
    if grid != spec.grid_size:
        positions = resample_abs_pos_embed(
            positions.float(), new_size=list(grid), old_size=list(spec.grid_size), num_prefix_tokens=with_prefix
        ).double()
    tokens = [weights.get(name) for name in ("cls_token", "dist_token", "reg_token")]
    prefix = torch.cat([t[0] for t in tokens if t is not None] or [positions.new_zeros(0, spec.embed_dim)])
    prefix = prefix + positions[0, :with_prefix] if with_prefix else prefix
    weight = _single(weights["patch_embed.proj.weight"])
    positions = _single(positions[0, with_prefix:])  # type: ignore[assignment]  # never None
    return PatchEmbed(
        weight=weight,  # type: ignore[arg-type]
        bias=_single(weights.get("patch_embed.proj.bias")),
        positions=positions,
        prefix=prefix.float(),
        eps=spec.norm_eps,
        embed_norm=_single(weights.affine("patch_embed.norm")) if spec.embed_norm else None,
        pre_norm=_single(weights.affine("norm_pre")) if spec.pre_norm else None,
    )


def attention_ops(
    spec: ViTSpec, index: int, weights: Weights, target: Target
) -> tuple[NormLinear | LinearResidual, RaggedAttention, LinearResidual]:
    """norm1 and qkv, the heads, proj: folds made, each head's slices aligned as the target wants them."""
    block = spec.blocks[index]
    heads = HeadTable.packed(block.qk_dims, block.v_dims, align=target.alignment)
    half = _half(weights, f"blocks.{index}", ("norm1", "attn.qkv", "attn.proj", "ls1"))
    half = half._replace(reads=block.attn_reads, writes=block.attn_writes)
    return fold.attention_ops(target, spec.embed_dim, heads, block.attn_scale, spec.norm_eps, half)


def mlp_op(spec: ViTSpec, index: int, weights: Weights) -> FusedMlp:
    """norm2, fc1, activation, fc2."""
    block = spec.blocks[index]
    half = _half(weights, f"blocks.{index}", ("norm2", "mlp.fc1", "mlp.fc2", "ls2"))
    half = half._replace(reads=block.mlp_reads, writes=block.mlp_writes)
    return fold.mlp_op(spec.embed_dim, spec.act, spec.norm_eps, half)


def _half(weights: Weights, block: str, names: tuple[str, str, str, str]) -> Sublayer:
    norm, first, last, scale = (f"{block}.{name}" for name in names)
    return Sublayer(
        weights[f"{norm}.weight"],
        weights[f"{norm}.bias"],
        weights[f"{first}.weight"],
        weights.get(f"{first}.bias"),
        weights[f"{last}.weight"],
        weights.get(f"{last}.bias"),
        weights.get(f"{scale}.gamma"),
    )


def emptied_bias(spec: ViTSpec, index: int, weights: Weights, sublayer: str) -> Tensor | None:
    """What an emptied attention or MLP still adds to every token: its output bias, layer-scaled, over all channels."""
    block = spec.blocks[index]
    part, scale, writes = {
        "attn": ("attn.proj", "ls1", block.attn_writes),
        "mlp": ("mlp.fc2", "ls2", block.mlp_writes),
    }[sublayer]
    bias = weights.get(f"blocks.{index}.{part}.bias")
    gamma = weights.get(f"blocks.{index}.{scale}.gamma")
    if bias is None:
        return None
    bias = bias if gamma is None else gamma * bias
    return bias if writes is None else spread(bias, writes, spec.embed_dim)


def pool_head_op(spec: ViTSpec, weights: Weights) -> PoolHead:
    """The final norm, pooling and classifier; the norm is folded into the classifier where pooling is linear."""
    norm = weights.affine("norm") if spec.final_norm else None
    # behind attention pooling it comes after the pool, where LatentPool has it
    fc_norm = weights.affine("fc_norm") if spec.fc_norm and spec.global_pool != "map" else None
    pool, prefix = pooling(spec)
    if spec.global_pool == "map" or spec.num_classes == 0:
        return PoolHead(spec.embed_dim, pool, prefix, spec.norm_eps, _single(norm), _single(fc_norm))
    weight, bias = weights["head.weight"], weights["head.bias"]
    if spec.distilled:
        weight = torch.cat([weight, weights["head_dist.weight"]], dim=1) / 2
        bias = (bias + weights["head_dist.bias"]) / 2
    # an affine norm without its affine part still normalises: weight one, bias zero
    plain = torch.stack([weight.new_ones(spec.embed_dim), weight.new_zeros(spec.embed_dim)])
    if fc_norm is not None:
        weight, bias = fold_norm(weight, bias, fc_norm[0], fc_norm[1])
        fc_norm = plain
    elif norm is not None and pool in ("token", "tokens", "avg", "none"):
        repeats = 2 if pool == "tokens" else 1
        weight, bias = fold_norm(weight, bias, norm[0].repeat(repeats), norm[1].repeat(repeats))
        norm = plain
    return PoolHead(
        spec.embed_dim, pool, prefix, spec.norm_eps, _single(norm), _single(fc_norm), _single(weight), _single(bias)
    )
