"""Patches to tokens, with positions and prefix tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    prefix: Tensor,
    eps: float,
    embed_norm: Tensor | None = None,
    pre_norm: Tensor | None = None,
) -> Tensor:
    """images [B, C, H, W], weight [E, C, P, Q], positions [patches, E], prefix [n, E] -> [B, n + patches, E].

    A norm is its weight and bias, [2, E]. The prefix tokens come with their positions added. Patches are cut at whole
    multiples of (P, Q); what is left at the right and bottom edge is not read.
    """
    patches = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if embed_norm is not None:
        patches = F.layer_norm(patches, patches.shape[-1:], embed_norm[0], embed_norm[1], eps)
    tokens = torch.cat([prefix.expand(len(images), *prefix.shape), patches + positions], dim=1)
    if pre_norm is not None:
        tokens = F.layer_norm(tokens, tokens.shape[-1:], pre_norm[0], pre_norm[1], eps)
    return tokens
