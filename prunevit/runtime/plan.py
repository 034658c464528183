"""Spec → steps: what runs, in which order, on which buffers.

A plan is the same for every backend but for the alignment of its packed rows. Each step is one op on named buffers;
buffers of one name share their memory, since no two views of a name are alive at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from prunevit_kernels import FusedMlp, LinearResidual, Op, PatchEmbed, Rule, SelectTokens, Target, TokenScores
from prunevit_kernels.fold import add_constant

from .._costs import head_macs, latent_pool_macs
from ..spec import BlockSpec, TokenSelect, ViTSpec
from .latent_pool import LatentPool
from .pack import Weights, attention_ops, emptied_bias, mlp_op, patch_embed_op, pool_head_op


@dataclass(frozen=True)
class View:
    """A [B, tokens, width] window on a named buffer ([B, tokens] where width is 0), or its ``first`` tokens only."""

    buffer: str
    tokens: int
    width: int
    first: int | None = None


@dataclass(frozen=True)
class Step:
    """One op on its buffers. ``macs`` are the useful multiply-accumulates an image, alignment gaps not counted."""

    name: str
    op: Op
    views: tuple[View, ...]
    macs: int
    block: int | None = None


@dataclass
class Plan:
    """The steps of one model at one image size, from the buffer ``images`` to the buffer ``out``."""

    steps: list[Step] = field(default_factory=list)

    @property
    def macs(self) -> int:
        """Multiply-accumulates an image that run: fewer than the spec has where no one reads a token's result."""
        return sum(step.macs for step in self.steps)

    @property
    def output(self) -> View:
        return self.steps[-1].views[-1]


def make_plan(
    spec: ViTSpec, tensors: Mapping[str, Tensor], target: Target, img_size: tuple[int, int] | None = None
) -> Plan:
    """The plan of ``spec`` with ``tensors`` (timm's names) at ``img_size``, laid out for ``target``."""
    return _Planner(spec, Weights(tensors), target, img_size or spec.img_size).plan()


def _last_attention(spec: ViTSpec) -> int | None:
    """Under class-token pooling, the block whose attention mixes tokens last: from there on one row is enough."""
    if spec.global_pool != "token" or spec.distilled:
        return None
    with_heads = [i for i, block in enumerate(spec.blocks) if block.qk_dims]
    return with_heads[-1] if with_heads else None


def _score_sources(spec: ViTSpec, last_attention: int | None) -> set[int]:
    """The blocks whose attention some selection scores tokens by."""
    sources, latest, cascade = [], -1, False
    for index, block in enumerate(spec.blocks[: None if last_attention is None else last_attention + 1]):
        before = None if block.select is None else block.select.before
        cascade = cascade or (block.select is not None and block.select.cascade)
        if before == "attn":
            sources.append(latest)
        latest = index if block.qk_dims else latest
        if before == "mlp" and index != last_attention:
            sources.append(latest)
    if not cascade:
        return set(sources)
    return {i for i, block in enumerate(spec.blocks) if block.qk_dims and i <= max(sources, default=-1)}


class _Planner:
    def __init__(self, spec: ViTSpec, weights: Weights, target: Target, img_size: tuple[int, int]) -> None:
        self.spec, self.weights, self.target = spec, weights, target
        pads = [p - 1 if spec.dynamic_img_pad else 0 for p in spec.patch_size]
        height, width = ((size + pad) // p for size, pad, p in zip(img_size, pads, spec.patch_size))
        self.grid = (height, width)
        self.tokens = spec.num_prefix_tokens + height * width
        self.steps: list[Step] = []
        self.turn = 0  # which of x0, x1 (and scores0, scores1) is current: a selection moves to the other
        self.first: int | None = None
        self.last_attention = _last_attention(spec)
        self.score_sources = _score_sources(spec, self.last_attention)

    def plan(self) -> Plan:
        self.stem()
        for index, block in enumerate(self.spec.blocks):
            self.select(index, block.select, "attn")
            self.attention(index, block)
            self.select(index, block.select, "mlp")
            self.mlp(index, block)
        self.head()
        return Plan(self.steps)

    @property
    def x(self) -> View:
        return View(f"x{self.turn}", self.tokens, self.spec.embed_dim, self.first)

    @property
    def scores(self) -> View:
        return View(f"scores{self.turn}", self.tokens, 0)

    def add(self, name: str, op: Op, *views: View, macs: int, block: int | None = None) -> None:
        self.steps.append(Step(name, op, views, macs, block))

    def stem(self) -> None:
        op = patch_embed_op(self.spec, self.weights, self.grid)
        images = View("images", 0, 0)
        patches = self.grid[0] * self.grid[1]
        self.add("patch_embed", op, images, self.x, macs=patches * op.weight.numel())

    def attention(self, index: int, block: BlockSpec) -> None:
        if not block.qk_dims:
            self.fold_emptied(index, block.has_attn, "attn")
            return
        qkv, attention, out = attention_ops(self.spec, index, self.weights, self.target)
        heads, name, n = attention.heads, f"blocks.{index}", self.tokens
        packed = View("qkv", n, heads.width)
        useful_in = block.qkv_dim * qkv.weight.shape[1]
        self.add(f"{name}.norm_linear", qkv, self.x, packed, macs=n * useful_in, block=index)
        if index in self.score_sources:
            rule, cascade = self.selection_rule()
            scored_before = any(isinstance(step.op, TokenScores) for step in self.steps)
            scorer = TokenScores(heads, rule, accumulate=cascade and scored_before)
            self.add(f"{name}.token_scores", scorer, packed, self.scores, macs=n * n * sum(block.qk_dims), block=index)
        if index == self.last_attention:
            self.first = 1
        queries = self.first or n
        context = View("context", queries, heads.out_width)
        per_pair = sum(block.qk_dims) + block.v_dim
        self.add(f"{name}.ragged_attention", attention, packed, context, macs=queries * n * per_pair, block=index)
        useful_out = block.v_dim * out.weight.shape[0]
        self.add(f"{name}.linear_residual", out, context, self.x, macs=queries * useful_out, block=index)

    def mlp(self, index: int, block: BlockSpec) -> None:
        if not block.mlp_dim:
            self.fold_emptied(index, block.has_mlp, "mlp")
            return
        op = mlp_op(self.spec, index, self.weights)
        macs = (self.first or self.tokens) * (op.w1.numel() + op.w2.numel())
        self.add(f"blocks.{index}.fused_mlp", op, self.x, macs=macs, block=index)

    def fold_emptied(self, index: int, present: bool, sublayer: str) -> None:
        """An emptied sublayer's bias goes to whoever wrote the residual stream last: no one has read it since."""
        constant = emptied_bias(self.spec, index, self.weights, sublayer) if present else None
        if constant is None:
            return
        at = max(i for i, step in enumerate(self.steps) if isinstance(step.op, PatchEmbed | LinearResidual | FusedMlp))
        step = self.steps[at]
        op = add_constant(step.op, constant)  # type: ignore[arg-type]  # one of the three
        self.steps[at] = Step(step.name, op, step.views, step.macs, step.block)

    def selection_rule(self) -> tuple[Rule, bool]:
        """The one rule, and whether it cascades, of all of the model's selections (the spec holds them to one)."""
        return next((b.select.rule, b.select.cascade) for b in self.spec.blocks if b.select is not None)

    def select(self, index: int, select: TokenSelect | None, before: str) -> None:
        if select is None or select.before != before or self.first is not None:
            return  # once one row is all that anyone reads, which others stay no longer matters
        op = SelectTokens(self.spec.embed_dim, select.keep, self.spec.num_prefix_tokens, select.fuse)
        x, scores = self.x, self.scores
        self.turn, self.tokens = 1 - self.turn, op.out_tokens
        self.add(f"blocks.{index}.select_tokens", op, x, scores, self.x, self.scores, macs=0, block=index)

    def head(self) -> None:
        op = pool_head_op(self.spec, self.weights)
        all_tokens = self.x.tokens if op.pool == "none" else 0
        width = op.pooled_dim if op.weight is None else op.weight.shape[0]
        macs = 0 if op.weight is None else op.weight.numel() * max(all_tokens, 1)
        if self.spec.attn_pool is None:
            self.add("pool_head", op, self.x, View("out", all_tokens, width), macs=macs)
            return
        features = View("features", self.tokens, self.spec.embed_dim)
        self.add("final_norm", op, self.x, features, macs=0)
        out = View("out", 0, self.spec.num_classes or self.spec.embed_dim)
        macs = latent_pool_macs(self.spec) + head_macs(self.spec)
        self.add("latent_pool", LatentPool.of(self.spec, self.weights), features, out, macs=macs)
