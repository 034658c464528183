"""Each method as the grid calls it: `prunevit.pruning.prune` with its options, what is common said once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from images import Batches, Images
from scores import PairsBySNP
from setting import Setting
from train import recovery

from prunevit.models import PrunedViT
from prunevit.pruning import Scorer, prune
from prunevit.pruning.journal import Probe, read_journal

#: query-key pairs, values, MLP neurons and the residual width: what SNP prunes, and here its rivals too
ALL = ("qk", "v", "mlp", "channel")
MIXED = "snp for pairs, magnitude"
#: what auto searches ratios for
INNER = ("qk", "v", "mlp")


@dataclass(frozen=True)
class Lab:
    """What a method is given. No test image is among it."""

    setting: Setting
    dense: PrunedViT
    train: Images
    calibration: Images
    validation: Images
    searches: Path  # where auto keeps its journals

    def shown(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The images that scores are measured on."""
        return list(Batches(self.calibration.sample(self.setting.calibration, seed), self.setting.batch))

    def steps(self, count: int, seed: int) -> Batches:
        """Augmented training batches, ``count`` of them to a pass."""
        return Batches(self.train, self.setting.batch, augment=True, steps=count, seed=seed)


@dataclass(frozen=True)
class Cut:
    """A pruned model, and the optimiser steps that went into it."""

    model: PrunedViT
    steps: int = 0


Method = Callable[[Lab, float, int], Cut]


def _prune(lab: Lab, name: str | Scorer, budget: float, seed: int, unit: str = "macs", **options: Any) -> PrunedViT:
    constraints = {unit: f"{100 * budget:g}%"}
    return prune(lab.dense, name, constraints, lab.shown(seed), seed=seed, **options)


def _scored(name: str | Scorer, **options: Any) -> Method:
    return lambda lab, budget, seed: Cut(_prune(lab, name, budget, seed, **options))


def _gohsp(unit: str) -> Method:
    """Soft stages, then the cut. Ranks across layers, so that layers differ in what they keep."""

    def method(lab: Lab, budget: float, seed: int) -> Cut:
        s = lab.setting
        train = lab.steps(s.gohsp_stage_steps, seed)
        options: dict[str, Any] = {"stages": s.gohsp_stages, "rho": s.gohsp_rho, "recipe": recovery(s)}
        model = _prune(lab, "gohsp", budget, seed, unit, isomorphic=True, train=train, **options)
        return Cut(model, s.gohsp_stages * s.gohsp_stage_steps)

    return method


def _uniform_in_rounds(lab: Lab, budget: float, seed: int) -> Cut:
    """SNP at one ratio for all, in equal factors, with recovery after each."""
    s = lab.setting
    train = lab.steps(s.steps // s.rounds, seed)
    options: dict[str, Any] = {"rounds": s.rounds, "recovery": {"epochs": 1, **recovery(s)}}
    model = _prune(lab, "snp", budget, seed, groups=INNER, train=train, **options)
    return Cut(model, s.rounds * (s.steps // s.rounds))


def _auto(scorer: str, in_rounds: bool = False) -> Method:
    def method(lab: Lab, budget: float, seed: int) -> Cut:
        s = lab.setting
        name = f"auto-{scorer}-{100 * budget:g}-{seed}{'-tuned' if in_rounds else ''}"
        journal = lab.searches / f"{name}.jsonl"
        options: dict[str, Any] = {"scorer": scorer, "tau": s.auto_tau, "journal": journal, "on_probe": _show}
        if in_rounds:
            options |= {"train": lab.steps(s.auto_round_steps, seed), "finetune_epochs": 1, "recipe": recovery(s)}
        held_out = list(Batches(lab.validation.first(s.auto_images), s.batch))
        model = _prune(lab, "auto", budget, seed, validation=held_out, **options)
        rounds = sum(probe.committed for probe in read_journal(journal)[1])
        return Cut(model, rounds * s.auto_round_steps if in_rounds else 0)

    return method


def _show(probe: Probe) -> None:
    print(f"  auto: round {probe.round} {probe.part} {probe.gone:.3f} -> {probe.accuracy:.1%} at {probe.cost:.1%}")


METHODS: dict[str, Method] = {
    "snp": _scored("snp", groups=ALL),
    "magnitude": _scored("magnitude", groups=ALL),
    "taylor": _scored("taylor", groups=ALL),
    "random": _scored("random", groups=ALL),
    "gohsp": _gohsp("macs"),
    "cp-vit": _scored("cp-vit"),
    "auto": _auto("snp"),
    "snp, inner": _scored("snp", groups=INNER),
    "gohsp, ranking alone": _scored("gohsp", isomorphic=True),
    "auto, in rounds": _auto("snp", in_rounds=True),
    "magnitude, inner": _scored("magnitude", groups=INNER),
    "auto by magnitude": _auto("magnitude"),
    "snp, inner, in rounds": _uniform_in_rounds,
    "gohsp, by params": _gohsp("params"),
    MIXED: _scored(PairsBySNP()),
}

#: recovered at the main point by every seed, and at the other budgets
MAIN = ("snp", "magnitude", "taylor", "random", "gohsp", "cp-vit", "auto")
#: what auto is compared with at equal accuracy
FOR_AUTO = ("snp, inner", "auto, in rounds", "snp, inner, in rounds")
#: the share of the MACs that CP-ViT keeps within a point of accuracy, as published: below 60 %
CP_VIT_CLAIM = 0.6
#: measured without any training, at every budget
UNTRAINED = (
    *("snp", "magnitude", "taylor", "random", MIXED, "gohsp, ranking alone", "cp-vit"),
    *("snp, inner", "auto", "magnitude, inner", "auto by magnitude"),
)
