"""Random: the baseline that every score has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import PrunedViT
from .groups import Group
from .method import Data, Scorer


@dataclass(frozen=True)
class Random(Scorer):
    """Uniform scores from the seed. Needs no data."""

    def score(self, model: PrunedViT, groups: Sequence[Group], data: Data | None, seed: int) -> dict[Group, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {group: torch.rand(group.size, generator=generator) for group in groups}
