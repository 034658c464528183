"""Spec → the steps of its plan by their sizes alone: no weights, no folding, a fraction of a millisecond.

What a search over shapes asks thousands of times. A test holds it to :func:`make_plan`, step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from prunevit_kernels import HeadTable, Target

from ..spec import BlockSpec, TokenSelect, ViTSpec
from .walk import COPIED_BYTES, View, Walk, pooling

Fixed = tuple[str | int | bool, ...]


@dataclass(frozen=True)
class StepSize:
    """One step: its op, what of it never changes by pruning, its widths, and the buffers that it touches.

    ``widths`` are, for each op (n tokens of an image; in and out only where they are not all of E):

    - ``patch_embed``: E
    - ``norm_linear``: n, E, out, [in]
    - ``ragged_attention``, ``token_scores``: n, the mean Dqk, the mean Dv of the heads (their number is fixed)
    - ``linear_residual``: n, in, E, [out]
    - ``fused_mlp``: n, E, F, [in], [out]
    - ``select_tokens``: n, kept patches, E
    - ``pool_head``, ``latent_pool``: n, E
    """

    op: str
    fixed: Fixed
    widths: tuple[float, ...]
    views: tuple[View, ...]


def sizes_of(spec: ViTSpec, target: Target) -> list[StepSize]:
    """The steps that :func:`make_plan` would give at the spec's image size, in order."""
    return _Sizes(spec, target).all()


def memory_bytes(spec: ViTSpec, target: Target, batch: int) -> int:
    """What inference holds: every parameter in the target's dtype, and the buffers of one batch size.

    A buffer is as large as its largest view, rows with the target's pitch. Panels that a kernel pads, the images of a
    caller, and the copy of the weights on the CPU that a runtime packs from are not counted; on a GPU, where a recorded
    program copies few images, those are.
    """
    sizes: dict[str, int] = {}
    for view in (view for step in sizes_of(spec, target) for view in step.views):
        if view.buffer == "images":
            pixels = spec.in_chans * spec.img_size[0] * spec.img_size[1]
            size = target.dtype.itemsize * batch * pixels
            sizes["images"] = size if target.device.type == "cuda" and size <= COPIED_BYTES else 0
            continue
        itemsize = torch.float32.itemsize if view.buffer.startswith("scores") else target.dtype.itemsize
        pitch = view.width if view.buffer == "out" else target.pitch(view.width)
        elements = batch * max(view.tokens, 1) * max(pitch, 1)
        sizes[view.buffer] = max(sizes.get(view.buffer, 0), itemsize * elements)
    return target.dtype.itemsize * spec.params() + sum(sizes.values())


class _Sizes(Walk):
    def __init__(self, spec: ViTSpec, target: Target) -> None:
        super().__init__(spec, spec.grid_size)
        self.target, self.width = target, spec.embed_dim
        self.steps: list[StepSize] = []

    def all(self) -> list[StepSize]:
        self.walk()
        return self.steps

    def add(self, op: str, fixed: Fixed, widths: Sequence[float | None], *views: View) -> None:
        self.steps.append(StepSize(op, fixed, tuple(w for w in widths if w is not None), views))

    def stem(self) -> None:
        spec = self.spec
        fixed = (spec.in_chans, *spec.patch_size, *self.grid, spec.num_prefix_tokens, spec.embed_norm, spec.pre_norm)
        self.add("patch_embed", fixed, (self.width,), View("images", 0, 0), self.x)

    def attention(self, index: int, block: BlockSpec) -> None:
        spec, n = self.spec, self.tokens
        if not block.qk_dims:
            self.emptied(block.has_attn and spec.proj_bias)
            return
        heads = HeadTable.packed(block.qk_dims, block.v_dims, align=self.target.alignment)
        packed = View("qkv", n, heads.width)
        reads, writes = _count(block.attn_reads), _count(block.attn_writes)
        self.add("norm_linear", (reads is not None,), (self.rows, self.width, heads.width, reads), self.x, packed)
        means = sum(block.qk_dims) / len(heads), block.v_dim / len(heads)
        if index in self.score_sources:
            self.add("token_scores", (self.selection_rule[0], len(heads)), (n, *means), packed, self.scores)
        if index == self.last_attention:
            self.first = 1
        context = View("context", self.rows, heads.out_width)
        self.add("ragged_attention", (self.first or 0, len(heads)), (n, *means), packed, context)
        fixed = (writes is not None, spec.layer_scale)
        self.add("linear_residual", fixed, (self.rows, heads.out_width, self.width, writes), context, self.x)

    def mlp(self, index: int, block: BlockSpec) -> None:
        spec = self.spec
        if not block.mlp_dim:
            self.emptied(block.has_mlp and spec.mlp_bias)
            return
        reads, writes = _count(block.mlp_reads), _count(block.mlp_writes)
        fixed = (spec.act, reads is not None, writes is not None, spec.layer_scale)
        self.add("fused_mlp", fixed, (self.rows, self.width, block.mlp_dim, reads, writes), self.x)

    def emptied(self, folded: bool) -> None:
        """A bias folded into whoever wrote last: a limited writer then writes all channels, without layer-scale."""
        writers = ("patch_embed", "linear_residual", "fused_mlp")
        at = max(i for i, step in enumerate(self.steps) if step.op in writers)
        step = self.steps[at]
        if not folded or step.op == "patch_embed":
            return
        limited = bool(step.fixed[-2])
        widths = step.widths[:-1] if limited else step.widths
        self.steps[at] = replace(step, fixed=(*step.fixed[:-2], False, False), widths=widths)

    def select_tokens(self, index: int, select: TokenSelect, x: View, scores: View) -> None:
        fixed = (self.spec.num_prefix_tokens, select.fuse)
        self.add("select_tokens", fixed, (x.tokens, select.keep, self.width), x, scores, self.x, self.scores)

    def head(self) -> None:
        spec = self.spec
        mapped = spec.global_pool == "map"
        pool, prefix = pooling(spec)
        classes = 0 if mapped else spec.num_classes
        fixed = (pool, prefix, spec.final_norm, spec.fc_norm and not mapped, classes)
        features = View("features", self.tokens, self.width)
        out = features if mapped else View("out", self.rows if pool == "none" else 0, classes or self.width)
        self.add("pool_head", fixed, (self.rows, self.width), self.x, out)
        if mapped and spec.attn_pool is not None:
            attention = (spec.attn_pool.num_heads, spec.attn_pool.mlp_dim, prefix, spec.num_classes)
            out = View("out", 0, spec.num_classes or self.width)
            self.add("latent_pool", attention, (self.tokens, self.width), features, out)


def _count(channels: tuple[int, ...] | None) -> int | None:
    return None if channels is None else len(channels)
