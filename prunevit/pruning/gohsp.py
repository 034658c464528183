"""GOHSP: graph- and optimisation-based heterogeneous structured pruning.

Yin et al., "GOHSP: A Unified Framework of Graph and Optimization-based Heterogeneous Structured Pruning for Vision
Transformer" (arXiv 2301.05345, §3.2 head ranking, §3.3 optimisation).

Heads: the heads of a layer are the states of a Markov chain that moves to similar heads; a head's importance is its
share of the stationary distribution. The optimisation prunes softly first: training minimises loss(W) + ρ/2 ‖W − Z +
U‖², where Z = Π(W + U) has the structure to come and U += W − Z; then it prunes hard and fine-tunes. The result is
heterogeneous: every layer keeps its own number of heads and every matrix its own neurons.

Our reading: units of a kind are ranked among all layers, a head's importance over the mean of its layer; S_ij = 1 −
JSD₂(A_i ‖ A_j) averaged over rows and images, S_ii = 0, rows normalised, damping as in PageRank; whether the
central head is the one to keep (representative) or to drop (redundant) is open, hence ``keep``; value neurons (columns
of proj), MLP neurons (rows of fc1, columns of fc2) and pairs are ranked by the norm of those; Π multiplies what
is to go by a mask that falls linearly to 0 over the stages (ADMM, scaled form), and what is to go is chosen anew at
each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .._options import expect_at_least
from ..errors import PruningError, expect
from ..models import PrunedViT
from .groups import Atoms, Group, Kind, groups_of
from .method import Data, Job, Scorer, evaluating, images_of, reduce_square, watched_qkv
from .plan import Plan
from .recipe import Recipe
from .recover import Step, recover_for
from .surgery import compact

_SOFT = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


@dataclass(frozen=True)
class GOHSP(Scorer):
    """Head ranking on ``images`` images; with ``stages`` soft stages of ``stage_epochs`` on the training data.

    Units are ranked ``isomorphic`` unless told otherwise: each layer keeps its own number of heads and neurons.
    ``recipe`` are options of :func:`recover` for the soft stages and for the ``finetune_epochs`` after the cut.
    Without ``stages`` the ranking alone prunes, at once.
    """

    damping: float = 0.85
    keep: Literal["central", "peripheral"] = "central"
    images: int = 64
    stages: int = 0
    stage_epochs: int = 1
    rho: float = 1e-3
    finetune_epochs: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)

    groups: ClassVar[tuple[Kind, ...]] = ("head", "v", "mlp")
    supports: ClassVar[tuple[Kind, ...]] = ("head", "qk", "v", "mlp", "read")

    def __post_init__(self) -> None:
        expect(0 < self.damping <= 1, PruningError, "damping in (0, 1]", got=self.damping)
        expect(self.keep in ("central", "peripheral"), PruningError, "keep central or peripheral", got=repr(self.keep))
        Recipe.of(self.recipe)
        expect(
            "epochs" not in self.recipe,
            PruningError,
            "epochs by stage_epochs and finetune_epochs",
            got="a recipe with epochs",
        )
        for name, least in (("stages", 0), ("stage_epochs", 1), ("finetune_epochs", 0), ("images", 1)):
            expect_at_least(self, name, least)
        expect(0 <= self.rho < math.inf, PruningError, "a finite rho of at least 0", got=self.rho)

    @torch.no_grad()
    def score(self, model: PrunedViT, groups: Sequence[Group], data: Data | None, seed: int) -> dict[Group, Tensor]:
        heads = [group for group in groups if group.kind == "head"]
        scores = self._heads(model, heads, data) if heads else {}
        return scores | group_norms(dict(model.named_parameters()), groups, model)

    def _heads(self, model: PrunedViT, groups: Sequence[Group], data: Data | None) -> dict[Group, Tensor]:
        totals = {group: torch.zeros(group.size, group.size, dtype=torch.float64) for group in groups}
        count = 0
        with watched_qkv(model) as seen:
            for images in images_of(data, model, self.images, of="gohsp"):
                model(images)
                count += len(images)
                for group in groups:
                    maps = attention_maps(seen[group.block], model, group.block)
                    totals[group] += similarity(maps).sum(0).double().cpu()
        scores = {}
        for group, total in totals.items():
            share = stationary(total / count, self.damping)
            only = group.size == 1  # which is as peripheral as it is central
            scores[group] = share if self.keep == "central" or only else 1 - share
        return scores

    def expect_fits(self, job: Job) -> None:
        super().expect_fits(job)
        if self.stages or self.finetune_epochs:
            job.training_data("gohsp trains in its soft stages and after the cut")

    def prune(self, job: Job) -> PrunedViT:
        ranking = job.budget.ranking
        if ranking.isomorphic is None and not ranking.global_pruning:
            job = replace(job, budget=replace(job.budget, ranking=replace(ranking, isomorphic=True)))
        if not self.stages:
            return self._finetuned(super().prune(job), job)
        groups = groups_of(job.model.spec, job.budget.kinds(job.model.spec, self.groups))
        with evaluating(job.model):
            ranked = self.score(job.model, [g for g in groups if g.kind == "head"], job.data, job.seed)
        soft = SoftPruning(deepcopy(job.model), groups, ranked, job, self)
        soft.train()
        return self._finetuned(compact(soft.model, soft.plan), job)

    def _finetuned(self, small: PrunedViT, job: Job) -> PrunedViT:
        if self.finetune_epochs:
            recover_for(job, small, self.recipe, epochs=self.finetune_epochs)
        return small


class SoftPruning:
    """W is trained towards Z, which has less and less of what is to go; U remembers how far it is behind."""

    def __init__(
        self, model: PrunedViT, groups: Sequence[Group], ranked: Mapping[Group, Tensor], job: Job, method: GOHSP
    ) -> None:
        self.model, self.groups, self.ranked, self.job, self.method = model, groups, ranked, job, method
        self.weights = {name: w for name, w in model.named_parameters() if name.endswith(_SOFT)}
        self.u = {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.z: dict[str, Tensor] = {}
        self.plan = self.project(stage=1)

    def train(self) -> None:
        method = self.method
        epochs = method.stages * method.stage_epochs

        def after(step: Step) -> None:
            stage, rest = divmod(step.step * method.stages, step.total)
            if rest < method.stages and stage < method.stages:  # the step that ends a stage
                self.plan = self.project(stage + 1)
            elif step.step == step.total:
                self.plan = self.project(method.stages)
            if self.job.on_step is not None:
                self.job.on_step(step)

        recover_for(self.job, self.model, method.recipe, epochs=epochs, penalty=self.penalty, on_step=after)

    def penalty(self, model: nn.Module) -> Tensor:
        """ρ/2 ‖W − Z + U‖²"""
        gaps = [(w - self.z[name] + self.u[name]).square().sum() for name, w in self.weights.items()]
        return torch.stack(gaps).sum() * (self.method.rho / 2)

    @torch.no_grad()
    def project(self, stage: int) -> Plan:
        """Z = Π(W + U) of a stage, U += W − Z; and the plan that Π is for."""
        ahead = {name: w + self.u[name] for name, w in self.weights.items()}
        norms = group_norms({**dict(self.model.named_parameters()), **ahead}, self.groups, self.model)
        plan = self.job.plan({**self.ranked, **norms})
        kept, axes = plan.kept_atoms(), Atoms.of(self.model.spec).axes()
        rest = 1 - stage / self.method.stages
        for name, w in ahead.items():
            z = w
            for axis, ids in enumerate(axes[name]):
                if ids is not None:
                    mask = torch.where(kept[ids], 1.0, rest).to(w.device, w.dtype)
                    z = z * (mask[:, None] if axis == 0 else mask)
            self.z[name] = z
            if stage > 1:  # the first Z is where training starts towards
                self.u[name] += self.weights[name] - z
        return plan


def attention_maps(qkv: Tensor, model: PrunedViT, i: int) -> Tensor:
    """qkv [B, N, rows] -> the attention of each head of block i [B, H, N, N], fp32 or wider."""
    block = model.spec.blocks[i]
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    q, k = wide[..., : 2 * sum(block.qk_dims)].chunk(2, dim=-1)
    dims = list(block.qk_dims)
    heads = zip(torch.split(q, dims, dim=-1), torch.split(k, dims, dim=-1))
    return torch.stack([(q_h @ k_h.mT * block.attn_scale).softmax(-1) for q_h, k_h in heads], dim=1)


def similarity(maps: Tensor) -> Tensor:
    """maps [B, H, N, N] -> S [B, H, H] = 1 − JSD₂ averaged over rows, 0 on the diagonal."""
    heads = maps.shape[1]

    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1).mean(-1) / torch.log(torch.tensor(2.0, dtype=p.dtype))

    own = entropy(maps)
    s = maps.new_zeros(len(maps), heads, heads)
    for i in range(heads):
        for j in range(i):
            divergence = entropy((maps[:, i] + maps[:, j]) / 2) - (own[:, i] + own[:, j]) / 2
            s[:, i, j] = s[:, j, i] = 1 - divergence
    return s


def stationary(s: Tensor, damping: float, tolerance: float = 1e-12, most: int = 10_000) -> Tensor:
    """S [H, H] ≥ 0 -> the stationary distribution [H] of π ← d π P + (1 − d)/H, by power iteration from uniform.

    One head has importance 1; a head like no other sends its weight everywhere.
    """
    heads = len(s)
    totals = s.sum(1, keepdim=True)
    p = torch.where(totals > 0, s / totals.clamp_min(1e-300), 1 / heads)
    share = torch.full((heads,), 1 / heads, dtype=s.dtype)
    for _ in range(most):
        # half a step at a time: an undamped chain of two heads would swing for ever
        moved = (share + damping * share @ p + (1 - damping) / heads) / 2
        if (moved - share).abs().max() < tolerance:
            return moved / moved.sum()
        share = moved
    raise PruningError(f"expected the Markov chain to settle within {most} steps, got {share.tolist()}")


def group_norms(weights: Mapping[str, Tensor], groups: Sequence[Group], model: PrunedViT) -> dict[Group, Tensor]:
    """The L2 norm of each neuron's or pair's own rows and columns."""
    atoms = Atoms.of(model.spec)
    axes, squares = atoms.axes(), torch.zeros(atoms.total, dtype=torch.float64)
    wanted = {
        "v": ("attn.proj.weight",),
        "qk": ("attn.qkv.weight",),
        "mlp": ("mlp.fc1.weight", "mlp.fc2.weight"),
        "read": ("attn.qkv.weight", "mlp.fc1.weight"),
    }
    scores = {}
    for kind, names in wanted.items():
        squares.zero_()
        for name, weight in weights.items():
            for axis, ids in enumerate(axes[name]) if name.endswith(names) else ():
                if ids is not None:
                    squares.index_add_(0, ids, reduce_square(weight, axis).cpu())
        for group in groups:
            if group.kind == kind:
                scores[group] = squares[atoms.in_group(group)].sqrt()
    return scores
