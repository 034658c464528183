"""Two scores made of prunevit's, to tell what SNP's ranking owes to which part of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from prunevit.models import PrunedViT
from prunevit.pruning import METHODS, Group, Scorer
from prunevit.pruning.groups import Kind

KINDS: tuple[Kind, ...] = ("qk", "v", "mlp", "channel")


@dataclass(frozen=True)
class Reversed(Scorer):
    """SNP's ranking upside down: it tells a score that is worth nothing from one that is worth less than that."""

    groups: ClassVar[tuple[Kind, ...]] = KINDS
    supports: ClassVar[tuple[Kind, ...]] = KINDS

    def score(self, model: PrunedViT, groups: Sequence[Group], data: object, seed: int) -> dict[Group, Tensor]:
        return {group: -score for group, score in scores_of("snp", model, groups, data, seed).items()}


@dataclass(frozen=True)
class PairsBySNP(Scorer):
    """SNP for what it was made for, query-key pairs; the norm of its weights for any other unit."""

    groups: ClassVar[tuple[Kind, ...]] = KINDS
    supports: ClassVar[tuple[Kind, ...]] = KINDS

    def score(self, model: PrunedViT, groups: Sequence[Group], data: object, seed: int) -> dict[Group, Tensor]:
        pairs = [group for group in groups if group.kind == "qk"]
        others = [group for group in groups if group.kind != "qk"]
        return {
            **scores_of("snp", model, pairs, data, seed),
            **scores_of("magnitude", model, others, data, seed),
        }


def scores_of(name: str, model: PrunedViT, groups: Sequence[Group], data: object, seed: int) -> dict[Group, Tensor]:
    """What a method of prunevit gives to groups."""
    scorer = METHODS[name]()
    assert isinstance(scorer, Scorer)
    return scorer.score(model, groups, data, seed)  # type: ignore[arg-type]
