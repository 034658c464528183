"""What a spec costs: parameters and multiply-accumulates, counted by hand.

One multiply-accumulate is one term of a matrix product. QKᵀ and AV are such products and count; biases, norms, softmax,
activations and additions do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .spec import ViTSpec


@dataclass(frozen=True)
class BlockCost:
    """One block, for one image. Sums of the parts: ``macs`` and ``params``."""

    qkv_macs: int
    attn_macs: int
    proj_macs: int
    mlp_macs: int
    attn_params: int
    mlp_params: int

    @property
    def macs(self) -> int:
        return self.qkv_macs + self.attn_macs + self.proj_macs + self.mlp_macs

    @property
    def params(self) -> int:
        return self.attn_params + self.mlp_params


def block_costs(spec: ViTSpec) -> list[BlockCost]:
    """Each block of a spec, in order, at the spec's own image size."""
    width, scale = spec.embed_dim, int(spec.layer_scale)

    def size(channels: tuple[int, ...] | None) -> int:
        return width if channels is None else len(channels)

    costs = []
    for block, (_, n_attn, n_mlp) in zip(spec.blocks, spec.tokens()):
        attn_in, attn_out = size(block.attn_reads), size(block.attn_writes)
        mlp_in, mlp_out = size(block.mlp_reads), size(block.mlp_writes)
        # attention sees the tokens before a selection that stands before the MLP
        qkv = attn_in * block.qkv_dim if block.qk_dims else 0
        attn = sum(dqk + dv for dqk, dv in zip(block.qk_dims, block.v_dims))
        attn_params = mlp_params = 0
        if block.has_attn:
            norm = 2 * width if block.qk_dims else 0  # an emptied attention reads nothing: its norm is gone
            bias = block.qkv_dim * spec.qkv_bias + attn_out * spec.proj_bias
            attn_params = norm + qkv + bias + block.v_dim * attn_out + scale * attn_out
        if block.has_mlp:
            norm = 2 * width if block.mlp_dim else 0
            bias = (block.mlp_dim + mlp_out) * spec.mlp_bias
            mlp_params = norm + block.mlp_dim * (mlp_in + mlp_out) + bias + scale * mlp_out
        costs.append(
            BlockCost(
                qkv_macs=n_attn * qkv,
                attn_macs=n_attn * n_attn * attn,
                proj_macs=n_attn * block.v_dim * attn_out,
                mlp_macs=n_mlp * block.mlp_dim * (mlp_in + mlp_out),
                attn_params=attn_params,
                mlp_params=mlp_params,
            )
        )
    return costs


def _patch_dim(spec: ViTSpec) -> int:
    return spec.in_chans * spec.patch_size[0] * spec.patch_size[1]


def latent_pool_macs(spec: ViTSpec, tokens: int) -> int:
    """Attention pooling over the last block's ``tokens``: q and proj of one latent, kv of every token, the MLP."""
    if spec.attn_pool is None:
        return 0
    n, width = tokens - spec.num_unpooled_tokens, spec.embed_dim
    return width * width * (2 + 2 * n) + 2 * n * width + 2 * width * spec.attn_pool.mlp_dim


def head_macs(spec: ViTSpec) -> int:
    """The classifier; without pooling it sees every token."""
    rows = spec.num_final_tokens if spec.global_pool == "" else 1 + spec.distilled
    return rows * spec.embed_dim * spec.num_classes


def stem_and_head_macs(spec: ViTSpec) -> int:
    """Patch embedding, attention pooling and classifier, for one image."""
    pooling = latent_pool_macs(spec, spec.num_final_tokens)
    return spec.num_patches * _patch_dim(spec) * spec.embed_dim + pooling + head_macs(spec)


def stem_and_head_params(spec: ViTSpec) -> int:
    """Everything outside the blocks."""
    width = spec.embed_dim
    positions = spec.num_patches + spec.num_prefix_positions
    norms = spec.embed_norm + spec.pre_norm + spec.final_norm + spec.fc_norm
    params = width * (_patch_dim(spec) + spec.patch_bias + positions + spec.num_prefix_tokens + 2 * norms)
    params += (width + 1) * spec.num_classes * (1 + spec.distilled)
    if spec.attn_pool is not None:
        hidden = spec.attn_pool.mlp_dim
        latent_q_kv_proj_norm = width + (width + 1) * 4 * width + 2 * width
        params += latent_q_kv_proj_norm + (width + 1) * hidden + (hidden + 1) * width
    return params
