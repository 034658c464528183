"""A timm ViT that Torch-Pruning has pruned in place. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023."""

from __future__ import annotations

import copy
from typing import Any

from timm.layers.attention import Attention
from torch import nn

from ..errors import UnsupportedModel
from ..models.from_timm import from_timm
from ..models.vit import PrunedViT


def from_torch_pruning(model: nn.Module) -> PrunedViT:
    """The same network as a PrunedViT, with a copy of its weights; ``model`` is left as it is.

    Expects what Torch-Pruning's own example leaves: each attention's ``num_heads`` and ``head_dim`` edited after
    pruning, and either timm's ``forward`` or the example's in its place. All widths may have changed, the residual
    stream's too. The softmax scale is what the model computes with: fused attention takes the pruned ``head_dim``
    ** -0.5, unfused attention its ``scale``, which pruning leaves alone.

    Raises :class:`UnsupportedModel` naming the attribute.
    """
    vit: Any = model
    for i, block in enumerate(getattr(vit, "blocks", ())):
        attn: Any = getattr(block, "attn", None)
        rows = 3 * attn.num_heads * attn.head_dim if isinstance(attn, Attention) else None
        if rows is not None and rows != attn.qkv.out_features:
            raise UnsupportedModel(
                f"blocks.{i}.attn: expected num_heads and head_dim that give qkv's {attn.qkv.out_features} rows, got "
                f"{attn.num_heads} × {attn.head_dim}: set num_heads = pruner.num_heads[attn.qkv] and "
                "head_dim = qkv.out_features // (3 * num_heads) after pruning"
            )
    edited: Any = copy.deepcopy(vit)
    for module in edited.modules():
        if isinstance(module, Attention):
            module.__dict__.pop("forward", None)  # the example's own, which reads the widths as pruning left them
    # timm's own record of the width is what it was before pruning
    if isinstance(getattr(vit, "patch_embed", None), nn.Module):
        edited.embed_dim = vit.patch_embed.proj.out_channels
    pruned = from_timm(edited)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    pruned.provenance = {"base_model": str(cfg.get("architecture", "vit")), "method": "torch-pruning"}
    return pruned
