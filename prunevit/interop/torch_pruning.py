"""A timm ViT that Torch-Pruning has pruned in place. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import nn

from ..errors import UnsupportedModel
from ..models.from_timm import from_timm
from ..models.vit import PrunedViT
from ..runtime.agreement import TOLERANCE, largest_error


def from_torch_pruning(model: nn.Module) -> PrunedViT:
    """The same network as a PrunedViT, with a copy of its weights; ``model`` is left as it is.

    Expects what Torch-Pruning's own example leaves: each attention's ``num_heads`` and ``head_dim`` edited after
    pruning, and either timm's ``forward`` or the example's in its place. All widths may have changed, the residual
    stream's too. The softmax scale is what the model computes with: fused attention takes the pruned ``head_dim``
    ** -0.5, unfused attention its ``scale``, which pruning leaves alone.

    Raises :class:`UnsupportedModel` naming the attribute, and where the two differ on random images: some attention has
    another ``forward`` then.
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
    _expect_same(vit, pruned)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    pruned.provenance = {"base_model": str(cfg.get("architecture", "vit")), "method": "torch-pruning"}
    return pruned


def _expect_same(vit: nn.Module, pruned: PrunedViT) -> None:
    """Refuse a model whose own ``forward`` computes something else than what has become of it."""
    images = torch.randn(2, pruned.spec.in_chans, *pruned.spec.img_size, generator=torch.Generator().manual_seed(0))
    both: list[Any] = [copy.deepcopy(model).cpu().double().eval() for model in (vit, pruned)]
    try:
        with torch.no_grad():
            for name, gamma in [pair for model in both for pair in model.named_parameters()]:
                if name.endswith(("ls1.gamma", "ls2.gamma")):
                    gamma.fill_(1)  # a small layer scale would hide what the sublayer computes
            want, got = (model(images.double()) for model in both)
        error = largest_error(got, want)
    except (RuntimeError, TypeError, AttributeError) as reason:
        raise UnsupportedModel(f"expected a model that runs after pruning, got {reason}") from None
    if not error <= TOLERANCE:
        what = f"the attention of timm or of Torch-Pruning's example, within {TOLERANCE:g} of the model's outputs"
        raise UnsupportedModel(f"expected {what}, got {error:.3g}: some forward computes something else")
