"""Spec → steps: what runs, in which order, on which buffers.

A plan is the same for every backend but for the alignment of its packed rows. Each step is one op on named buffers;
buffers of one name share their memory, since no two views of a name are alive at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from prunevit_kernels import FusedMlp, LinearResidual, Op, PatchEmbed, SelectTokens, Target, TokenScores
from prunevit_kernels.fold import add_constant

from .._costs import head_macs, latent_pool_macs
from ..spec import BlockSpec, TokenSelect, ViTSpec
from .latent_pool import LatentPool
from .pack import Weights, attention_ops, emptied_bias, mlp_op, patch_embed_op, pool_head_op
from .walk import View, Walk


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
        """Multiply-accumulates an image that run.

        Fewer than the spec has where no one reads a token's result; scoring tokens takes a second pass over QKᵀ, which
        the spec does not count.
        """
        return sum(step.macs for step in self.steps)

    @property
    def output(self) -> View:
        return self.steps[-1].views[-1]


def make_plan(
    spec: ViTSpec,
    tensors: Mapping[str, Tensor],
    target: Target,
    img_size: tuple[int, int] | None = None,
    stem_alone: bool = False,
) -> Plan:
    """The plan of ``spec`` with ``tensors`` (timm's names) at ``img_size``, laid out for ``target``.

    With ``stem_alone`` every other op has shapes alone: another image size changes the values of no other.
    """
    return _Planner(spec, tensors, target, img_size or spec.img_size, stem_alone).plan()


class _Planner(Walk):
    def __init__(
        self, spec: ViTSpec, tensors: Mapping[str, Tensor], target: Target, img_size: tuple[int, int], stem_alone: bool
    ) -> None:
        super().__init__(spec, spec.grid_of(img_size))
        self.stem_weights, self.target = Weights(tensors), target
        self.weights = Weights(tensors, "meta") if stem_alone else self.stem_weights
        self.steps: list[Step] = []

    def plan(self) -> Plan:
        self.walk()
        return Plan(self.steps)

    def add(self, name: str, op: Op, *views: View, macs: int, block: int | None = None) -> None:
        self.steps.append(Step(name, op, views, macs, block))

    def stem(self) -> None:
        op = patch_embed_op(self.spec, self.stem_weights, self.grid)
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
            rule, cascade = self.selection_rule
            scored_before = any(isinstance(step.op, TokenScores) for step in self.steps)
            scorer = TokenScores(heads, rule, accumulate=cascade and scored_before)
            scored = scorer.queries(n) * n * sum(block.qk_dims)
            self.add(f"{name}.token_scores", scorer, packed, self.scores, macs=scored, block=index)
        if index == self.last_attention:
            self.first = 1
        context = View("context", self.rows, heads.out_width)
        per_pair = sum(block.qk_dims) + block.v_dim
        self.add(f"{name}.ragged_attention", attention, packed, context, macs=self.rows * n * per_pair, block=index)
        useful_out = block.v_dim * out.weight.shape[0]
        self.add(f"{name}.linear_residual", out, context, self.x, macs=self.rows * useful_out, block=index)

    def mlp(self, index: int, block: BlockSpec) -> None:
        if not block.mlp_dim:
            self.fold_emptied(index, block.has_mlp, "mlp")
            return
        op = mlp_op(self.spec, index, self.weights)
        macs = self.rows * (op.w1.numel() + op.w2.numel())
        self.add(f"blocks.{index}.fused_mlp", op, self.x, macs=macs, block=index)

    def fold_emptied(self, index: int, present: bool, sublayer: str) -> None:
        """An emptied sublayer's bias goes to whoever wrote the residual stream last: no one has read it since."""
        at = max(i for i, step in enumerate(self.steps) if isinstance(step.op, PatchEmbed | LinearResidual | FusedMlp))
        step = self.steps[at]
        weights = self.stem_weights if isinstance(step.op, PatchEmbed) else self.weights
        constant = emptied_bias(self.spec, index, weights, sublayer) if present else None
        if constant is None:
            return
        op = add_constant(step.op, constant)  # type: ignore[arg-type]  # one of the three
        self.steps[at] = Step(step.name, op, step.views, step.macs, step.block)

    def select_tokens(self, index: int, select: TokenSelect, x: View, scores: View) -> None:
        op = SelectTokens(self.spec.embed_dim, select.keep, self.spec.num_prefix_tokens, select.fuse)
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
        macs = latent_pool_macs(self.spec, self.tokens) + head_macs(self.spec)
        self.add("latent_pool", LatentPool.of(self.spec, self.weights), features, out, macs=macs)
