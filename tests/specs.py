"""Small awkward specs by name, and a model of each with every parameter random, so that nothing hides."""

from __future__ import annotations

import torch

from prunevit.models.vit import PrunedViT
from prunevit.spec import AttnPoolSpec, BlockSpec, TokenSelect, ViTSpec

SCALE = 16**-0.5


def block(qk: tuple[int, ...] = (8, 8), v: tuple[int, ...] = (8, 8), mlp: int = 24, **fields: object) -> BlockSpec:
    return BlockSpec(qk_dims=qk, v_dims=v, attn_scale=SCALE, mlp_dim=mlp, **fields)  # type: ignore[arg-type]


def vit(*blocks: BlockSpec, embed_dim: int = 29, **fields: object) -> ViTSpec:
    small = {"img_size": (12, 16), "patch_size": (4, 4), "num_classes": 7, **fields}
    return ViTSpec(embed_dim=embed_dim, blocks=blocks, **small)  # type: ignore[arg-type]


def select(
    before: str, keep: int, *, rule: str = "max_attention", cascade: bool = False, fuse: bool = False
) -> TokenSelect:
    return TokenSelect(before=before, rule=rule, keep=keep, cascade=cascade, fuse=fuse)  # type: ignore[arg-type]


CLASS_ATTENTION = {"rule": "class_attention"}

SPECS: dict[str, ViTSpec] = {
    "uniform": vit(block(), block(), embed_dim=32),
    "every_head_its_own_width": vit(block((13, 5, 1), (12, 3, 7), 31), block((1,), (16,), 1)),
    "one_head_13_by_12": vit(block((13,), (12,), 17)),
    "no_heads": vit(block((), ()), block()),
    "no_heads_at_the_end": vit(block(), block((), ())),
    "no_heads_anywhere": vit(block((), ()), block((), ())),
    "no_mlp": vit(block(mlp=0), block()),
    "emptied_block_first": vit(block((), (), 0), block()),
    "emptied_after_layer_scale": vit(block(), block((), (), 0), block(), layer_scale=True),
    "emptied_after_pre_norm": vit(block((), (), 0), block(), pre_norm=True, patch_bias=False),
    "removed_sublayers": vit(block((), (), has_attn=False), block(mlp=0, has_mlp=False)),
    "no_blocks": vit(),
    "partial_reads_and_writes": vit(
        block(attn_reads=(0, 3, 4, 28), attn_writes=(1, 2, 27), mlp_reads=(5, 6), mlp_writes=(0, 28)),
        block((), (), mlp=0, attn_writes=(3, 9), mlp_writes=(4,)),
        block(mlp_writes=(0, 1, 2)),
    ),
    "partial_writes_with_layer_scale": vit(
        block(attn_writes=(1, 2, 27), mlp_writes=(0, 28)), block((), (), 5), layer_scale=True
    ),
    "no_biases": vit(block(), block(), qkv_bias=False, proj_bias=False, mlp_bias=False, patch_bias=False),
    "layer_scale": vit(block(), block(), layer_scale=True),
    "clip_like": vit(block(), block(), pre_norm=True, patch_bias=False, act="quick_gelu", norm_eps=1e-5),
    "gelu_tanh": vit(block(), act="gelu_tanh"),
    "relu": vit(block(), act="relu"),
    "registers": vit(block(), block(), reg_tokens=3),
    "registers_not_embedded": vit(block(), reg_tokens=4, no_embed_class=True),
    "distilled": vit(block(), block(), distilled=True),
    "distilled_no_classes": vit(block(), block(), distilled=True, num_classes=0),
    "average_pool_fc_norm": vit(block(), class_token=False, global_pool="avg", final_norm=False, fc_norm=True),
    "average_pool_final_norm": vit(block(), block(), global_pool="avg"),
    "average_pool_with_prefix": vit(block(), block(), global_pool="avg", pool_include_prefix=True),
    "max_pool": vit(block(), global_pool="max"),
    "avgmax_pool_two_norms": vit(block(), global_pool="avgmax", fc_norm=True),
    "no_pool": vit(block(), global_pool=""),
    "no_final_norm": vit(block(), final_norm=False),
    "no_classes": vit(block(), num_classes=0),
    "embed_norm": vit(block(), embed_norm=True),
    "one_channel_image": vit(block(), in_chans=1),
    "image_with_a_remainder": vit(block(), img_size=(15, 18)),
    "attention_pool": vit(
        block(), embed_dim=32, class_token=False, global_pool="map", attn_pool=AttnPoolSpec(num_heads=4, mlp_dim=40)
    ),
    "attention_pool_no_classes": vit(
        block(), embed_dim=32, global_pool="map", num_classes=0, attn_pool=AttnPoolSpec(num_heads=2, mlp_dim=9)
    ),
    "attention_pool_fc_norm": vit(
        block(), embed_dim=32, global_pool="map", fc_norm=True, attn_pool=AttnPoolSpec(num_heads=4, mlp_dim=40)
    ),
    "select_before_mlp": vit(block(), block(select=select("mlp", 5)), block()),
    "select_before_attn": vit(block(), block(select=select("attn", 5)), block()),
    "select_in_the_last_block": vit(block(), block(select=select("mlp", 5))),
    "select_and_average": vit(block(), block(select=select("mlp", 5)), global_pool="avg"),
    "evit": vit(
        block(select=select("mlp", 7, fuse=True, **CLASS_ATTENTION)),  # type: ignore[arg-type]
        block(select=select("mlp", 4, fuse=True, **CLASS_ATTENTION)),  # type: ignore[arg-type]
        block(),
    ),
    "cp_vit_cascade": vit(
        block(),
        block(select=select("attn", 8, cascade=True)),
        block((), (), select=select("mlp", 6, cascade=True)),
        block(select=select("attn", 3, cascade=True)),
        block(),
        reg_tokens=1,
    ),
}


def random_model(spec: ViTSpec, seed: int = 0) -> PrunedViT:
    """Every parameter random: norms, tokens, layer scales and biases too."""
    model = PrunedViT(spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "norm_pre.weight")):
                parameter.add_(1.0)
    return model.eval()


def random_images(spec: ViTSpec, batch: int = 3, seed: int = 1) -> torch.Tensor:
    """Images with a mean: zero-mean inputs hide half of the masking faults."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, spec.in_chans, *spec.img_size, generator=generator) + 3
