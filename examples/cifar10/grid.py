"""The grid: which cells there are, in the order they are worth having, and how each is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from images import Batches, Images
from journal import Cell, Journal
from measure import accuracy, agreement, costs, map_error
from methods import ALL, CP_VIT_CLAIM, FOR_AUTO, MAIN, METHODS, MIXED, UNTRAINED, Lab
from scores import Reversed
from setting import Setting
from train import recover_for, train_dense

import prunevit
import prunevit.pruning
from prunevit.data import Split
from prunevit.errors import BudgetError
from prunevit.models import PrunedViT

#: scores by the kinds of unit that they are compared on, one kind at a time
SCORES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(ALL, ("snp", "snp, reversed", "magnitude", "taylor", "random")),
    "head": ("gohsp, central", "gohsp, peripheral", "magnitude", "taylor", "random"),
}


def cells(s: Setting) -> Iterator[Cell]:
    """Every cell, the most wanted first."""
    yield {"stage": "dense", "seed": 0}

    def recovered(methods: Iterable[str], budget: float, seed: int) -> Iterator[Cell]:
        return ({"stage": "recovered", "method": m, "budget": budget, "seed": seed} for m in methods)

    yield from recovered(("dense", *MAIN), s.main, 0)
    yield {"stage": "cut", "method": "dense", "budget": 1.0, "seed": 0}
    for method in UNTRAINED:
        for budget in (s.main, *s.others) if method.startswith("auto") else s.cuts:
            for seed in range(s.seeds if method == "random" else 1):
                yield {"stage": "cut", "method": method, "budget": budget, "seed": seed}
    for kind, scores in SCORES.items():
        for ratio in s.ratios:
            for score in scores:
                for seed in range(s.seeds if score == "random" else 1):
                    yield {"stage": "one kind", "kind": kind, "score": score, "ratio": ratio, "seed": seed}
    for kind in ALL:
        for other in ("magnitude", "taylor"):
            yield {"stage": "agreement", "kind": kind, "scores": ["snp", other], "seed": 0}
    yield from recovered(("gohsp, by params",), s.claimed_params, 0)
    yield from recovered(("cp-vit",), CP_VIT_CLAIM, 0)
    yield from recovered(("gohsp, ranking alone", MIXED), s.main, 0)
    yield from recovered(FOR_AUTO, s.main, 0)
    for seed in range(1, s.seeds):
        yield from recovered(("dense", *MAIN), s.main, seed)
    for budget in sorted(s.others):
        yield from recovered(MAIN, budget, 0)
    for budget in sorted(s.others):
        yield from recovered(FOR_AUTO, budget, 0)
    yield {"stage": "small", "seed": 0}


class Grid:
    """Runs cells. Everything that outlives a cell is a file below ``out``."""

    def __init__(self, setting: Setting, images: dict[Split, Images], out: Path, journal: Journal) -> None:
        self.setting, self.out, self.journal = setting, out, journal
        self.images = images | {"test": images["test"].first(setting.test)}
        self.lab: Lab | None = None

    def run(self, cell: Cell) -> None:
        """Measure a cell and write it down. Budgets that a method cannot reach are results too."""
        start = time.monotonic()
        stage: Callable[[Cell], dict[str, Any]] = getattr(self, "_" + cell["stage"].replace(" ", "_"))
        try:
            facts = stage(cell)
        except BudgetError as error:
            facts = {"unreachable": str(error)}
        self.journal.add(cell, facts | {"seconds": round(time.monotonic() - start, 1)})

    # -- stages ------------------------------------------------------------------------------------------------------

    def _dense(self, cell: Cell) -> dict[str, Any]:
        model, history = self._trained(self.setting.width, "dense", cell["seed"])
        prunevit.save(model, self.out / "models" / "dense")
        return {**costs(model, model), "accuracy": self._tested(model), "history": history}

    def _small(self, cell: Cell) -> dict[str, Any]:
        """A dense model of about half the size, trained as the large one was, then as pruned ones are."""
        lab = self._lab()
        model, history = self._trained(self.setting.small_width, "small", cell["seed"])
        before = self._tested(model)
        self._recover(model, self.setting.steps, cell)
        facts = {"cut": before, "accuracy": self._tested(model), "steps": self.setting.steps, "history": history}
        return {**costs(model, lab.dense), **facts, "checkpoint": self._save(model, cell)}

    def _recovered(self, cell: Cell) -> dict[str, Any]:
        lab, budget, seed = self._lab(), cell["budget"], cell["seed"]
        if cell["method"] == "dense":
            model, steps = self._copy(lab.dense), 0
        else:
            cut = METHODS[cell["method"]](lab, budget, seed)
            model, steps = cut.model, cut.steps
        before, rest = self._tested(model), max(0, self.setting.steps - steps)
        if rest:
            self._recover(model, rest, cell)
        facts = {"cut": before, "accuracy": self._tested(model), "steps": steps + rest}
        return {**costs(model, lab.dense), **facts, "checkpoint": self._save(model, cell)}

    def _cut(self, cell: Cell) -> dict[str, Any]:
        lab, method = self._lab(), cell["method"]
        model = lab.dense if method == "dense" else METHODS[method](lab, cell["budget"], cell["seed"]).model
        return {**costs(model, lab.dense), "accuracy": self._tested(model, self.setting.probed)}

    def _one_kind(self, cell: Cell) -> dict[str, Any]:
        lab, seed = self._lab(), cell["seed"]
        name, _, variant = cell["score"].partition(", ")
        options = {"keep": variant} if name == "gohsp" else {}
        model = prunevit.pruning.prune(
            lab.dense,
            Reversed() if variant == "reversed" else name,
            None,
            lab.shown(seed),
            seed=seed,
            groups=(cell["kind"],),
            pruning_ratio=cell["ratio"],
            **options,
        )
        facts = {**costs(model, lab.dense), "accuracy": self._tested(model, self.setting.probed)}
        if cell["kind"] == "qk":
            facts["map_error"] = map_error(model, lab.dense, lab.shown(seed)[0][0])
        return facts

    def _agreement(self, cell: Cell) -> dict[str, Any]:
        one, other = cell["scores"]
        return {"spearman": agreement(self._lab(), cell["kind"], one, other, cell["seed"])}

    # -- parts -------------------------------------------------------------------------------------------------------

    def _trained(self, width: int, name: str, seed: int) -> tuple[PrunedViT, list[dict[str, float]]]:
        s = self.setting
        train = Batches(self.images["train"], s.batch, augment=True)
        state = self.out / "states" / f"{name}-{seed}.safetensors"
        model, history = train_dense(s, width, train, state, seed)
        return prunevit.from_timm(model).eval(), history

    def _lab(self) -> Lab:
        if self.lab is None:
            dense = prunevit.load(self.out / "models" / "dense").eval()
            images = {name: self.images[name] for name in ("train", "calibration", "validation")}
            self.lab = Lab(self.setting, dense, searches=self.out / "searches", **images)
            self.teacher = prunevit.accelerate(self._copy(dense))
        return self.lab

    def _recover(self, model: PrunedViT, steps: int, cell: Cell) -> None:
        lab, seed = self._lab(), cell["seed"]
        what = " ".join(str(value) for value in cell.values())
        recover_for(model, self.teacher, lab.steps(steps, seed), self.setting, seed, what)

    def _tested(self, model: PrunedViT, most: int | None = None) -> float:
        images = self.images["test"]
        return accuracy(model, images if most is None else images.first(most))

    def _copy(self, model: PrunedViT) -> PrunedViT:
        copy = PrunedViT(model.spec)
        copy.load_state_dict(model.state_dict())
        copy.pretrained_cfg = dict(model.pretrained_cfg)
        return copy.eval()

    def _save(self, model: PrunedViT, cell: Cell) -> str:
        name = "-".join(str(value).replace(", ", "-").replace(" ", "-") for value in cell.values())
        prunevit.save(model, self.out / "models" / name)
        return name
