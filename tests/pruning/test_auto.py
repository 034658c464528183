"""The search: its bound, its ends, its journal, and what it does where accuracy is not monotone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunevit.errors import BudgetError, CheckpointError, PruningError
from prunevit.pruning import Plan, auto, prune
from prunevit.pruning.journal import Probe, plot_journal, read_journal
from prunevit.pruning.method import Scorer
from tests.specs import block, random_images, random_model, vit

SPEC = vit(block((8,) * 3, (8,) * 3, 24), block((8,) * 3, (8,) * 3, 24))
MODEL = random_model(SPEC)
IMAGES = random_images(SPEC, 24)
# the dense model is right about every image: what pruning costs is seen at once
DATA = [(IMAGES, MODEL(IMAGES).argmax(-1))]
OPTIONS: dict[str, object] = {"scorer": "magnitude", "validation": DATA, "data": DATA, "tau": 0.2}


def test_it_finds_ratios_of_their_own_within_the_bound_and_the_budget(tmp_path: Path) -> None:
    probes: list[Probe] = []
    small = prune(MODEL, "auto", {"macs": "75%"}, journal=tmp_path / "journal", on_probe=probes.append, **OPTIONS)
    assert 0.74 <= small.spec.macs() / SPEC.macs() <= 0.75
    header, written = read_journal(tmp_path / "journal")
    assert header["scorer"] == "magnitude"
    assert [p for p in written if not p.committed] == list(dict.fromkeys(probes))
    starts = {p.round: p.accuracy for p in written if p.part == "start"}
    committed = [p for p in written if p.committed]
    assert committed
    for probe in committed:
        assert probe.accuracy >= starts[probe.round] - 0.2
    assert Plan.from_dict(small.plan).dense == SPEC
    plot_journal(tmp_path / "journal", tmp_path / "search.png")
    assert (tmp_path / "search.png").stat().st_size > 5000


def test_where_nothing_has_to_go_the_given_model_stays_as_it_is() -> None:
    before = dict(MODEL.provenance)
    small = prune(MODEL, "auto", {"macs": "100%"}, **OPTIONS)
    assert (small is MODEL, MODEL.plan, MODEL.provenance) == (False, None, before)
    assert Plan.from_dict(small.plan) == Plan.keep_all(SPEC)
    assert torch.equal(small(IMAGES), MODEL(IMAGES))


def test_an_interrupted_search_continues_without_repeating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune(MODEL, "auto", {"macs": "75%"}, journal=tmp_path / "whole", **OPTIONS)
    count = len((tmp_path / "whole").read_text().splitlines())

    class Interrupted(Exception):
        pass

    def stop(probe: Probe) -> None:
        if len((tmp_path / "broken").read_text().splitlines()) >= count // 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        prune(MODEL, "auto", {"macs": "75%"}, journal=tmp_path / "broken", on_probe=stop, **OPTIONS)
    with (tmp_path / "broken").open("a") as file:
        file.write('{"round": 1, "part": "mh')  # the crash came while writing
    measured = 0
    original = auto.accuracy

    def counting(*args: object) -> float:
        nonlocal measured
        measured += 1
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(auto, "accuracy", counting)
    monkeypatch.setattr(Path, "write_text", lambda *_: pytest.fail("what was paid for is written again"))
    again = prune(MODEL, "auto", {"macs": "75%"}, journal=tmp_path / "broken", **OPTIONS)
    assert again.plan == whole.plan
    assert (tmp_path / "broken").read_text() == (tmp_path / "whole").read_text()
    assert 0 < measured < count - 2
    with pytest.raises(CheckpointError, match="of this search"):
        prune(MODEL, "auto", {"macs": "70%"}, journal=tmp_path / "broken", **OPTIONS)


def test_finetuning_between_rounds_resumes_too(tmp_path: Path) -> None:
    options = {**OPTIONS, "train": DATA, "finetune_epochs": 1, "recipe": {"lr": 1e-4}}
    first = prune(MODEL, "auto", {"macs": "85%"}, journal=tmp_path / "j", **options)
    again = prune(MODEL, "auto", {"macs": "85%"}, journal=tmp_path / "j", **options)
    alone = prune(MODEL, "auto", {"macs": "85%"}, **options)
    for other in (again, alone):
        assert torch.equal(first.head.weight, other.head.weight)
        assert first.plan == other.plan


@pytest.mark.parametrize(
    "other",
    [
        {"isomorphic": True},
        {"min_kept": 4},
        {"ignored_layers": ["blocks.0.*"]},
        {"validation": [(IMAGES, (DATA[0][1] + 1) % 7)]},
        {"validation": [(IMAGES[:12], DATA[0][1][:12])]},
    ],
    ids=["isomorphic", "min_kept", "ignored_layers", "other_labels", "fewer_images"],
)
def test_the_journal_of_another_search_is_refused(other: dict[str, object], tmp_path: Path) -> None:
    options = {**OPTIONS, "journal": tmp_path / "j"}
    prune(MODEL, "auto", {"macs": "90%"}, **options)
    shuffled = [(IMAGES.flip(0)[i : i + 8], DATA[0][1].flip(0)[i : i + 8]) for i in range(0, 24, 8)]
    prune(MODEL, "auto", {"macs": "90%"}, **{**options, "validation": shuffled})  # the same images
    with pytest.raises(CheckpointError, match="of this search"):
        prune(MODEL, "auto", {"macs": "90%"}, **{**options, **other})


def test_the_journal_of_a_search_by_other_scores_is_refused(tmp_path: Path) -> None:
    options = {**OPTIONS, "scorer": "snp", "journal": tmp_path / "j"}
    prune(MODEL, "auto", {"macs": "90%"}, **options)
    prune(MODEL, "auto", {"macs": "90%"}, **options)
    others = [(random_images(SPEC, 24, seed=5) * torch.linspace(0, 4, 16), DATA[0][1])]
    with pytest.raises(CheckpointError, match=r"j to be of this search, .* \(other calibration images"):
        prune(MODEL, "auto", {"macs": "90%"}, **{**options, "data": others})


def test_a_scorer_without_a_name_resumes_too(tmp_path: Path) -> None:
    class Mine(Scorer):
        def __init__(self, sign: int) -> None:
            self.sign = sign

        def score(self, model: Any, groups: Any, data: Any, seed: int) -> dict[Any, torch.Tensor]:
            return {group: self.sign * torch.arange(float(group.size)) for group in groups}

    def found(sign: int) -> object:
        options = {**OPTIONS, "scorer": Mine(sign), "journal": tmp_path / "j"}
        return prune(MODEL, "auto", {"macs": "90%"}, **options).plan

    assert found(1) == found(1)
    with pytest.raises(CheckpointError, match="of this search"):
        found(-1)


def test_costs_are_counted_anew_where_a_search_goes_on(tmp_path: Path) -> None:
    """A table that was measured again says other times, of an absolute budget too."""

    def costs(fixed: float, journal: Path | None) -> list[float]:
        seen: list[Probe] = []
        own: dict[str, Any] = {**OPTIONS, "cost": lambda spec: fixed + spec.macs() / SPEC.macs(), "journal": journal}
        prune(MODEL, "auto", {"time": 1.75}, on_probe=seen.append, **{**own, "tau": 1.0})
        return [probe.cost for probe in seen]

    assert costs(1.0, tmp_path / "j") != costs(0.9, None)
    assert costs(0.9, tmp_path / "j") == costs(0.9, None)


def test_rounds_are_not_resumed_from_those_of_another_search(tmp_path: Path) -> None:
    """Their files outlive a deleted journal, and journals may differ in their last suffix alone."""
    options = {**OPTIONS, "train": DATA, "finetune_epochs": 1}
    prune(MODEL, "auto", {"macs": "85%"}, **{**options, "journal": tmp_path / "j.2"})
    prune(MODEL, "auto", {"macs": "85%"}, **{**options, "journal": tmp_path / "j.3", "scorer": "random"})
    (tmp_path / "j.2").unlink()
    with pytest.raises(CheckpointError, match=r"j\.2\.round0 to be of this run"):
        prune(MODEL, "auto", {"macs": "85%"}, **{**options, "journal": tmp_path / "j.2", "scorer": "random"})


def accuracy_by_width(monkeypatch: pytest.MonkeyPatch, worth: object) -> None:
    monkeypatch.setattr(auto, "accuracy", lambda model, data: worth(model.spec))  # type: ignore[operator]


def test_the_far_end_is_tried_first_where_accuracy_dips_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worse at a small ratio than at a large one: bisection from below would have stopped at once."""
    accuracy_by_width(monkeypatch, lambda spec: 0.5 if 20 < spec.blocks[0].mlp_dim < 24 else 1.0)
    seen: list[Probe] = []
    prune(MODEL, "auto", {"macs": "90%"}, **{**OPTIONS, "tau": 0.0, "step": 0.25, "on_probe": seen.append})
    assert next(p.ratio for p in seen if p.part == "ffn") == 0.25


def test_the_step_shrinks_until_the_search_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy_by_width(monkeypatch, lambda spec: 1.0 if spec == SPEC else 0.0)
    seen: list[Probe] = []
    with pytest.raises(BudgetError, match="within tau"):
        prune(MODEL, "auto", {"macs": "50%"}, **{**OPTIONS, "step": 0.4, "min_step": 0.1, "on_probe": seen.append})
    assert {p.ratio for p in seen} >= {0.4, 0.2, 0.1}


def test_the_part_that_saves_most_for_its_loss_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention costs accuracy, the MLP does not: the MLP gives, until nothing of it is left to give."""
    accuracy_by_width(monkeypatch, lambda spec: 0.9 + 0.1 * sum(map(sum, (b.qk_dims for b in spec.blocks))) / 48)
    small = prune(MODEL, "auto", {"macs": "80%"}, **OPTIONS)
    assert [b.qk_dims for b in small.spec.blocks] == [(8, 8, 8)] * 2


def test_against_dense_the_whole_loss_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy_by_width(monkeypatch, lambda spec: spec.macs() / SPEC.macs())
    with pytest.raises(BudgetError):
        prune(MODEL, "auto", {"macs": "60%"}, **{**OPTIONS, "against": "dense", "min_step": 0.05})
    small = prune(MODEL, "auto", {"macs": "60%"}, **OPTIONS)
    assert small.spec.macs() <= 0.6 * SPEC.macs()


@pytest.mark.parametrize("step", [0.02, 0.05, 0.2])
def test_the_ratios_that_it_finds_are_those_that_go(step: float) -> None:
    """Through any number of rounds, in groups of a few units too."""
    seen: list[Probe] = []
    options: dict[str, Any] = {**OPTIONS, "tau": 1.0, "step": step, "on_probe": seen.append}
    small = prune(MODEL, "auto", {"macs": "80%"}, **options)
    assert len({probe.round for probe in seen}) > 1
    for part, (have, had) in {
        "mhsa": (sum(sum(b.qk_dims + b.v_dims) for b in spec.blocks) for spec in (small.spec, SPEC)),
        "ffn": (sum(b.mlp_dim for b in spec.blocks) for spec in (small.spec, SPEC)),
    }.items():
        at_last = max((probe for probe in seen if probe.part == part), key=lambda probe: probe.gone)
        assert at_last.gone >= 1 - have / had
        unit = 1 / 8 if part == "mhsa" else 1 / 24
        assert all(probe.gone < probe.ratio + unit for probe in seen if probe.part == part)


def test_heads_go_though_a_step_is_less_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy_by_width(monkeypatch, lambda spec: 1.0 if spec.blocks[0].mlp_dim == 24 else 0.0)
    seen: list[Probe] = []
    options: dict[str, Any] = {**OPTIONS, "mhsa": ("head",), "step": 0.1, "on_probe": seen.append}
    small = prune(MODEL, "auto", {"macs": "75%"}, **options)
    assert [b.num_heads for b in small.spec.blocks] == [1, 2], "no further than the budget asks"
    assert [round(p.gone, 3) for p in seen if p.part == "mhsa"] == [0.333, 0.5]


def test_no_model_is_measured_twice_in_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy_by_width(monkeypatch, lambda spec: 1.0 if spec == SPEC else 0.0)
    seen: list[Probe] = []
    options: dict[str, Any] = {**OPTIONS, "mhsa": ("head",), "step": 0.3, "min_step": 0.3, "on_probe": seen.append}
    with pytest.raises(BudgetError):
        prune(MODEL, "auto", {"macs": "50%"}, **options)
    assert [p.ratio for p in seen if p.part == "mhsa"] == [0.3], "a third of its heads, at any smaller ratio too"


@pytest.mark.parametrize(("method", "options"), [("auto:mlp", {}), ("auto", {"groups": ("mlp",)})])
def test_only_the_kinds_that_are_asked_for_go(method: str, options: dict[str, object]) -> None:
    small = prune(MODEL, method, {"macs": "85%"}, **{**OPTIONS, **options, "tau": 1.0})
    assert [(b.qk_dims, b.v_dims) for b in small.spec.blocks] == [((8, 8, 8), (8, 8, 8))] * 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"validation": None}, "held-out"),
        ({"groups": ("mlp", "channel")}, r"groups out of qk, v, mlp .* got mlp, channel"),
        ({"pruning_ratio": 0.5}, "that auto goes by, .* got pruning_ratio"),
        ({"finetune_epochs": 1}, "expected train="),
        ({"scorer": "auto"}, "a scorer out of gohsp"),
        ({"step": 0.01}, "min_step"),
        ({"mhsa": ("heads",)}, "kinds of group"),
        ({"scorer": "snp", "mhsa": ("head",)}, "combine it"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], reason: str) -> None:
    with pytest.raises(PruningError, match=reason):
        prune(MODEL, "auto", {"macs": "75%"}, **{**OPTIONS, **options})
