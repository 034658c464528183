"""patch_embed on the CPU."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .. import cpu
from ..op import SHAPES
from ..target import Launch, Target
from . import PatchEmbed


class Packed:
    def __init__(self, op: PatchEmbed, target: Target) -> None:
        self.op, self.target = op.to(SHAPES), target
        self.linear = cpu.packed_linear(op.weight.flatten(1), op.bias)
        vectors = (op.positions, op.prefix, op.embed_norm, op.pre_norm)
        self.stem = cpu.extension().Stem(*map(cpu.vector, vectors))

    def bind(self, images: Tensor, x: Tensor) -> Launch:
        return self.rebindable(images, x)(images)

    def rebindable(self, first: Tensor, *rest: Tensor) -> Callable[[Tensor], Launch]:
        """Launches on any images like ``first``; of the check, the sizes and the weights nothing is done again."""
        (x,) = rest
        self.op.check(self.target, first, x)
        native, weights = cpu.extension().patch_embed, (self.target.pool, self.linear, self.stem)
        shapes = tuple(first.shape), tuple(self.op.weight.shape[2:])
        sizes = cpu.tokens(x), len(self.op.prefix), self.op.eps

        def launch_on(images: Tensor) -> Launch:
            launch: Launch = native((images, x), *weights, images.data_ptr(), *shapes, *sizes)
            return launch

        return launch_on
