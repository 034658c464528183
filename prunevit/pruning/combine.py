"""Combinations: several methods one after another, and iterative pruning with recovery in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ..errors import PruningError, expect
from ..models import PrunedViT
from .auto import Auto
from .budget import Budget, Limit
from .groups import Kind
from .journal import journal_of
from .method import Job, Method
from .recover import recover_for


@dataclass(frozen=True)
class Stage:
    """One of several methods; ``groups`` are the kinds that it prunes (None: its own), ``limits`` its constraints.

    Without limits it takes its share of the way to the last ones.
    """

    method: Method
    groups: tuple[Kind, ...] | None = None
    limits: tuple[Limit, ...] | None = None

    def budget(self, whole: Budget, share: float) -> Budget:
        """What of a whole budget is this stage's, after which a ``share`` of the way is gone."""
        limits = self.limits or tuple(_part(limit, share) for limit in whole.limits)
        ranking = whole.ranking if self.groups is None else replace(whole.ranking, groups=self.groups)
        return replace(whole, limits=limits, ranking=ranking)


@dataclass(frozen=True)
class Sequential(Method):
    """Stages in turn, all of them ``rounds`` times; with a ``recipe``, recovery from the given model after each.

    Every stage takes an equal factor off the way from the model's cost to its limit, so that the last one ends at it;
    a model that is to keep 25 % after two stages keeps 50 % after the first. Whatever a stage cannot do is refused
    before the first one runs.
    """

    stages: Sequence[Stage]
    rounds: int = 1
    recipe: Mapping[str, Any] | None = None

    groups: ClassVar[tuple[Kind, ...]] = ()

    def prune(self, job: Job) -> PrunedViT:
        expect(self.rounds >= 1, PruningError, "at least one round", got=self.rounds)
        budget, stages = job.budget, _with_own_journals([stage for _ in range(self.rounds) for stage in self.stages])
        one = len(stages) == 1
        expect(one or budget.shape is None, PruningError, "a shape for one method, in one round", got="several")
        shares = bool(budget.limits) or self.rounds == 1
        expect(shares, PruningError, "constraints, to share among several rounds", got="none")
        tokens = sum(stage.method.drops_tokens for stage in stages)
        expect(tokens <= 1, PruningError, "one method that drops tokens, in one round", got=tokens)
        if self.recipe is not None:
            job.training_data("recovery after pruning")
        steps = [(stage.method, stage.budget(budget, n / len(stages))) for n, stage in enumerate(stages, start=1)]
        for method, own in steps:
            method.expect_fits(replace(job, budget=own))
        model = job.model
        for method, own in steps:
            model = method.prune(replace(job, model=model, budget=own))
            if self.recipe is not None:
                recover_for(job, model, self.recipe)
        return model


def _with_own_journals(steps: Sequence[Stage]) -> list[Stage]:
    """Each search but the first in a file of its own: ``JOURNAL.search2`` and so on."""
    made, searches = list[Stage](), 0
    for stage in steps:
        if isinstance(method := stage.method, Auto) and method.journal is not None:
            searches += 1
            stage = replace(stage, method=replace(method, journal=journal_of(method.journal, search=searches)))
        made.append(stage)
    return made


def _part(limit: Limit, share: float) -> Limit:
    """The limit after a share of the way, in equal factors."""
    return limit if share == 1 else replace(limit, most=limit.dense * (limit.most / limit.dense) ** share)
