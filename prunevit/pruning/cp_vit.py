"""CP-ViT's cascade, and EViT's fused tokens: patches that nobody looks at are dropped on the way.

Song et al., "CP-ViT: Cascade Vision Transformer Pruning via Progressive Sparsity Prediction" (arXiv 2203.04570, §3):
a token's informative score is the most attention that any query pays it, summed over heads and accumulated over
layers; the lowest are dropped and stay dropped, more of them the deeper the layer; heads are scored likewise. Liang
et al., "Not All Patches Are What You Need" (EViT, arXiv 2202.07800, §3.2–3.3): the patches that the class token
attends to most stay, between attention and MLP; the others become one token, their mean weighted by that attention.

Our reading: dropped means dropped (the authors' code multiplies by zero), to counts that depend on the layer alone,
so that the spec says them and a batch stays rectangular; CP-ViT's ratio of layer l rises linearly from 0 at ``start``
to the full ratio in the last layer, for tokens and heads alike; a head's score is summed over tokens and averaged
over images, in its own layer alone (the heads of two layers have nothing in common).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from .._options import expect_at_least
from ..errors import BudgetError, PruningError, expect
from ..models import PrunedViT
from ..spec import TokenSelect, ViTSpec
from .gohsp import attention_maps
from .groups import Group, Kind, groups_of
from .method import Job, Method, evaluating, images_of, watched_qkv
from .plan import Plan
from .surgery import compact


class _TokenMethod(Method):
    """Finds the ratio, in [0, 1], whose plan meets the budget; ``pruning_ratio`` gives it instead."""

    drops_tokens: ClassVar[bool] = True

    def expect_fits(self, job: Job) -> None:
        spec, fixed = job.model.spec, job.budget.ranking.pruning_ratio
        chosen = [i for i, block in enumerate(spec.blocks) if block.select is not None]
        expect(not chosen, PruningError, "a model that does not select tokens yet", got=f"one that does in {chosen}")
        expect(not spec.dynamic_img_size, PruningError, "a static image size, for static counts", got="a dynamic one")
        expect(job.budget.shape is None, PruningError, "constraints or a pruning_ratio for tokens", got="a shape")
        expect(not isinstance(fixed, Mapping), PruningError, "one pruning_ratio for tokens", got=fixed)

    def prune(self, job: Job) -> PrunedViT:
        plan_of = self.planner(job)
        fixed = job.budget.ranking.pruning_ratio
        if fixed is not None:
            plan = plan_of(float(fixed))  # type: ignore[arg-type]
            expect(job.budget.met(plan.spec()), BudgetError, "a pruning_ratio that meets the budget", got=fixed)
            return compact(job.model, plan)
        return compact(job.model, _smallest_ratio(job, plan_of))

    @abstractmethod
    def planner(self, job: Job) -> Callable[[float], Plan]:
        """The plan for a ratio of what goes."""


@dataclass(frozen=True)
class CPViT(_TokenMethod):
    """Tokens, and unless told otherwise heads, from layer ``start`` on (None: a quarter of the way).

    ``ignored_layers``, ``min_kept``, ``max_pruning_ratio`` and ``round_to`` are about the heads.
    """

    heads: bool = True
    start: int | None = None
    images: int = 64

    groups: ClassVar[tuple[Kind, ...]] = ("head",)
    supports: ClassVar[tuple[Kind, ...]] = ("head",)
    heeds: ClassVar[tuple[str, ...]] = (
        *("groups", "pruning_ratio"),
        *("ignored_layers", "min_kept", "max_pruning_ratio", "round_to"),
    )

    def __post_init__(self) -> None:
        expect_at_least(self, "images", 1)
        late = self.start is None or self.start >= 1
        expect(late, PruningError, "a start after the first layer, which no scores come before", got=self.start)

    def expect_fits(self, job: Job) -> None:
        super().expect_fits(job)
        depth = job.model.spec.depth
        expect(
            self._start(depth) < depth,
            PruningError,
            f"a start before the last of {depth} layers",
            got=self._start(depth),
        )

    def _start(self, depth: int) -> int:
        return max(1, depth // 4) if self.start is None else self.start

    def planner(self, job: Job) -> Callable[[float], Plan]:
        spec, start = job.model.spec, self._start(job.model.spec.depth)
        ranking = job.budget.ranking
        wanted = self.heads and "head" in (ranking.groups or self.groups)
        scores = self._heads(job) if wanted else {}
        first = job.first(scores)
        _, may_go = replace(ranking, pruning_ratio=None).order(scores, first)

        def plan_of(ratio: float) -> Plan:
            share = [ratio * max(0, i - start + 1) / (spec.depth - start) for i in range(spec.depth)]
            dropped: dict[Group, list[int]] = {bundle.group: [] for bundle in may_go}
            for bundle in may_go:
                gone, group = dropped[bundle.group], bundle.group
                had = first.get(group, group).size
                if had - group.size + len(gone) + len(bundle.units) <= int(had * share[group.block]):
                    gone += bundle.units
            keep = [max(1, spec.num_patches - int(spec.num_patches * s)) for s in share]
            selects = [
                TokenSelect(before="attn", rule="max_attention", keep=k, cascade=True) if k < before else None
                for k, before in zip(keep, [spec.num_patches, *keep])
            ]
            return Plan.without(spec, dropped).with_selection(selects)

        return plan_of

    @torch.no_grad()
    def _heads(self, job: Job) -> dict[Group, Tensor]:
        groups = groups_of(job.model.spec, ("head",))
        scores = {group: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        with evaluating(job.model), watched_qkv(job.model) as seen:
            for images in images_of(job.data, job.model, self.images, of="cp-vit"):
                job.model(images)
                for group in groups:
                    maps = attention_maps(seen[group.block], job.model, group.block)
                    scores[group] += maps.amax(2).sum((0, 2)).double().cpu()
        return scores


@dataclass(frozen=True)
class EViT(_TokenMethod):
    """The same share of the patches goes at each of ``layers`` (None: a quarter, half and three quarters in)."""

    layers: Sequence[int] | None = None
    fuse: bool = True

    groups: ClassVar[tuple[Kind, ...]] = ()
    supports: ClassVar[tuple[Kind, ...]] = ()
    heeds: ClassVar[tuple[str, ...]] = ("pruning_ratio",)

    def expect_fits(self, job: Job) -> None:
        super().expect_fits(job)
        spec, layers = job.model.spec, self._layers(job.model.spec.depth)
        expect(spec.class_token, PruningError, "a class token, whose attention evit ranks by", got="a model without")
        inside = layers and all(0 <= i < spec.depth for i in layers)
        expect(bool(inside), PruningError, f"layers within the {spec.depth} blocks", got=layers)

    def _layers(self, depth: int) -> list[int]:
        return sorted({depth * n // 4 for n in (1, 2, 3)}) if self.layers is None else list(self.layers)

    def planner(self, job: Job) -> Callable[[float], Plan]:
        spec, layers = job.model.spec, self._layers(job.model.spec.depth)

        def plan_of(ratio: float) -> Plan:
            tokens, selects = spec.num_patches, list[TokenSelect | None]()
            for i in range(spec.depth):
                keep = max(1, tokens - int(tokens * ratio))
                here = i in layers and keep < tokens
                selects.append(
                    TokenSelect(before="mlp", rule="class_attention", keep=keep, fuse=self.fuse) if here else None
                )
                tokens = keep + self.fuse if here else tokens
            return Plan.keep_all(spec).with_selection(selects)

        return plan_of


def _smallest_ratio(job: Job, plan_of: Callable[[float], Plan]) -> Plan:
    """Bisect the ratio, then give back what tokens a step of it took too many."""
    most = plan_of(1.0).spec()
    for limit in job.budget.limits:
        limit.expect_reachable(most, "token and head", "combine it with another method")
    low, high = 0.0, 1.0
    if job.budget.met(plan_of(0.0).spec()):
        return plan_of(0.0)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if job.budget.met(plan_of(middle).spec()) else (middle, high)
    return _with_more_tokens(job, plan_of(high))


def _with_more_tokens(job: Job, plan: Plan) -> Plan:
    spec = plan.spec()
    for i in range(spec.depth):
        while (select := plan.blocks[i].select) is not None and not any(
            limit.close(plan.spec()) for limit in job.budget.limits
        ):
            grown = select.model_copy(update={"keep": select.keep + 1})
            more = _selected(plan, i, grown)
            if more is None or not job.budget.met(more.spec()):
                break
            plan = more
    return plan


def _selected(plan: Plan, i: int, select: TokenSelect) -> Plan | None:
    """The plan with another selection in block i; None where fewer tokens reach it."""
    reaching = _patches_before(plan.spec(), i)
    if select.keep >= reaching:
        return None
    return plan.with_selection([select if at == i else None for at in range(len(plan.blocks))])


def _patches_before(spec: ViTSpec, i: int) -> int:
    return spec.tokens()[i][0] - spec.num_prefix_tokens
