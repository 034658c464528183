"""patch_embed: images into the residual stream.

Buffers: images [B, C, H, W] contiguous is read, x [B, n + patches, E] is written. ``embed_norm`` normalises the
patches before positions are added, ``pre_norm`` all tokens after (CLIP); a norm's weight and bias come as one tensor
[2, E].
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .._expect import expect, expect_affine, expect_buffer, expect_vector
from ..op import Op
from ..target import Target
from .reference import patch_embed

__all__ = ["PatchEmbed", "patch_embed"]


@dataclass(frozen=True, eq=False)
class PatchEmbed(Op):
    """weight [E, C, P, Q], bias [E] or None, positions [patches, E], prefix [n, E], norms [2, E] or None; fp32."""

    weight: Tensor
    bias: Tensor | None
    positions: Tensor
    prefix: Tensor
    eps: float
    embed_norm: Tensor | None = None
    pre_norm: Tensor | None = None

    def __post_init__(self) -> None:
        embed_dim = self.weight.shape[0]
        expect(self.weight.dim() == 4, "weight [E, C, P, Q]", got=tuple(self.weight.shape))
        expect_vector("bias", self.bias, embed_dim)
        for name in ("positions", "prefix"):
            rows = getattr(self, name)
            expect(
                rows.dim() == 2 and rows.shape[1] == embed_dim,
                f"{name} [rows, E]",
                got=tuple(rows.shape),
                want=embed_dim,
            )
        expect_affine("embed_norm", self.embed_norm, embed_dim)
        expect_affine("pre_norm", self.pre_norm, embed_dim)

    def check(self, target: Target, images: Tensor, x: Tensor) -> None:
        embed_dim, channels, p, q = self.weight.shape
        expect_buffer("images", images, (None, channels, None, None), target)
        expect(images.is_contiguous(), "contiguous images", got=images.stride())
        patches = (images.shape[2] // p) * (images.shape[3] // q)
        expect(patches == len(self.positions), "one position a patch", got=len(self.positions), want=patches)
        expect_buffer("x", x, (len(images), len(self.prefix) + patches, embed_dim), target)

    def reference(self, images: Tensor, x: Tensor) -> None:
        stem = (self.weight, self.bias, self.positions, self.prefix)
        x.copy_(patch_embed(images, *stem, self.eps, self.embed_norm, self.pre_norm))
