"""patch_embed on the CPU."""

from __future__ import annotations

from torch import Tensor

from .. import cpu
from ..target import Launch, Target
from . import PatchEmbed


class PackedPatchEmbed:
    def __init__(self, op: PatchEmbed, target: Target) -> None:
        self.op, self.target = op, target
        self.linear = cpu.packed_linear(op.weight.flatten(1), op.bias)
        vectors = (op.positions, op.prefix, op.embed_norm, op.pre_norm)
        self.stem = cpu.extension().Stem(*map(cpu.vector, vectors))

    def bind(self, images: Tensor, x: Tensor) -> Launch:
        self.op.check(self.target, images, x)
        shapes = tuple(images.shape), tuple(self.op.weight.shape[2:])
        rest = cpu.tokens(x), len(self.op.prefix), self.op.eps
        weights = self.target.pool, self.linear, self.stem
        launch: Launch = cpu.extension().patch_embed((images, x), *weights, images.data_ptr(), *shapes, *rest)
        return launch


def pack(op: PatchEmbed, target: Target) -> PackedPatchEmbed:
    return PackedPatchEmbed(op, target)
