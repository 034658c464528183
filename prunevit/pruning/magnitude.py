"""Magnitude: a unit is worth the norm of its weights.

Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), on the coupled weights of a group as in
"DepGraph" (arXiv 2301.12900, §3.3). Our reading: every weight indexed by a unit counts, incoming and outgoing, biases
too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models import PrunedViT
from .groups import Atoms, Group
from .method import Data, Scorer, reduce_square


@dataclass(frozen=True)
class Magnitude(Scorer):
    """L2 norm over all weights of a unit. Needs no data."""

    def score(self, model: PrunedViT, groups: Sequence[Group], data: Data | None, seed: int) -> dict[Group, Tensor]:
        atoms = Atoms.of(model.spec)
        squares = atom_squares(model, atoms)

        def over(*parts: range) -> Tensor:
            return torch.stack([squares[part.start : part.stop].sum() for part in parts]).sum()

        scores = {}
        for group in groups:
            if group.kind == "head":
                pairs = zip(atoms.qk[group.block], atoms.v[group.block])
                square = torch.stack([over(qk, v) for qk, v in pairs])
            elif group.kind == "sublayer":
                part = "attn" if ".attn." in group.layer else "mlp"
                square = torch.stack([_square_of(model, f"blocks.{i}.{part}.") for i in group.blocks])
            else:
                square = squares[atoms.in_group(group)]
            scores[group] = square.sqrt()
        return scores


def atom_squares(model: PrunedViT, atoms: Atoms) -> Tensor:
    """Σ w² over the weights that each atom indexes, fp64 [atoms]."""
    axes, total = atoms.axes(), torch.zeros(atoms.total, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        for axis, ids in enumerate(axes.get(name, ())):
            if ids is not None:
                total.index_add_(0, ids, reduce_square(parameter, axis).cpu())
    reads, channels = atoms.read_channels()  # what reads a channel goes with it
    total.index_add_(0, channels, total[reads])
    return total


def _square_of(model: PrunedViT, prefix: str) -> Tensor:
    weights = [
        p.detach().double().square().sum().cpu() for name, p in model.named_parameters() if name.startswith(prefix)
    ]
    return torch.stack([torch.zeros((), dtype=torch.float64), *weights]).sum()
