"""What a pruned model says of how it was pruned: every call, with all that was asked for, through checkpoints too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prunevit import checkpoint
from prunevit.pruning import prune
from prunevit.pruning.taylor import Taylor
from tests.specs import block, random_images, random_model, vit

SPEC = vit(*[block((8,) * 4, (8,) * 4)] * 3)
MODEL = random_model(SPEC)
DATA = [(random_images(SPEC, 8), torch.arange(8) % 7)]


def test_each_methods_own_constraints_stay_beside_it() -> None:
    methods, each = ["magnitude:qk", "magnitude:v,mlp"], [{"macs": "95%"}, {"macs": "70%"}]
    small = prune(MODEL, methods, each)
    assert small.provenance["method"] == "magnitude:qk+magnitude:v,mlp"
    assert small.provenance["prunings"] == [{"method": methods, "constraints": each, "seed": 0}]


def test_a_pruning_is_added_to_those_before(tmp_path: Path) -> None:
    once = prune(MODEL, "magnitude", {"macs": "80%"})
    kept = dict(once.provenance)
    twice = prune(checkpoint.load(checkpoint.save(once, tmp_path / "once")), "random", {"params": "90%"}, seed=3)
    assert twice.provenance["method"] == "magnitude+random"
    assert twice.provenance["prunings"] == [
        {"method": "magnitude", "constraints": {"macs": "80%"}, "seed": 0},
        {"method": "random", "constraints": {"params": "90%"}, "seed": 3},
    ]
    prune(once, "random", {"macs": "90%"})
    assert once.provenance == kept, "the given model is left as it is"
    assert "prunings" not in MODEL.provenance


def test_what_was_measured_of_the_model_before_is_not_said_of_the_next() -> None:
    once = prune(MODEL, "magnitude", {"macs": "80%"})
    once.provenance |= {"latency": {"measured_ms": 2.0}, "accuracy": {"validation": 0.9}, "base_model": "deit"}
    twice = prune(once, "random", {"macs": "90%"})
    assert set(twice.provenance) == {"base_model", "method", "prunings"}
    assert once.provenance["accuracy"] == {"validation": 0.9}


@pytest.mark.parametrize(
    ("before", "first"),
    [
        (
            {"base_model": "deit", "method": "snp+random", "constraints": {"macs": "50%"}, "seed": 1},
            [{"method": "snp+random", "constraints": {"macs": "50%"}, "seed": 1}],
        ),
        ({"base_model": "vit", "method": "torch-pruning"}, [{"method": "torch-pruning"}]),
        ({"base_model": "deit", "prunings": "none"}, []),
    ],
    ids=["older", "imported", "not_a_list"],
)
def test_what_a_checkpoint_had_before_comes_first(
    before: dict[str, Any], first: list[dict[str, Any]], tmp_path: Path
) -> None:
    older = random_model(SPEC)
    older.provenance = before
    again = prune(checkpoint.load(checkpoint.save(older, tmp_path / "older")), "magnitude", {"macs": "90%"})
    latest = {"method": "magnitude", "constraints": {"macs": "90%"}, "seed": 0}
    assert again.provenance["prunings"] == [*first, latest]
    assert again.provenance["method"] == "+".join([*(entry["method"] for entry in first), "magnitude"])
    assert again.provenance["base_model"] == before["base_model"]
    assert not {"constraints", "seed"} & again.provenance.keys()


SHAPE = prune(MODEL, "magnitude", {"macs": "70%"}).spec
ASKED: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "ratios": ("magnitude", {"pruning_ratio": {"mlp": 0.5}}, {"method": "magnitude", "pruning_ratio": {"mlp": 0.5}}),
    "shape": ("magnitude", {"shape": SHAPE}, {"method": "magnitude", "shape": "ViTSpec"}),
    "a_method_of_ones_own": (
        Taylor(images=4),
        {"pruning_ratio": 0.25},
        {"method": "Taylor(images=4)", "pruning_ratio": 0.25},
    ),
    "rounds_and_options": (
        ["snp:qk", "magnitude:mlp"],
        {
            "constraints": {"macs": "80%"},
            "rounds": 2,
            "recovery": {"epochs": 1},
            "gamma": 2,
            "ignored_layers": ("blocks.0",),
        },
        {
            "method": ["snp:qk", "magnitude:mlp"],
            "constraints": {"macs": "80%"},
            "rounds": 2,
            "recovery": {"epochs": 1},
            "gamma": 2,
            "ignored_layers": ["blocks.0"],
        },
    ),
    "a_search": (
        "auto",
        {"constraints": {"macs": "80%"}, "tau": 1.0, "scorer": "magnitude", "on_probe": print, "journal": "search"},
        {"method": "auto", "constraints": {"macs": "80%"}, "tau": 1.0, "scorer": "magnitude"},
    ),
}


@pytest.mark.parametrize("case", ASKED)
def test_all_that_was_asked_for_is_written_down(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, options, entry = ASKED[case]
    monkeypatch.chdir(tmp_path)
    small = prune(MODEL, method, data=DATA, train=DATA, validation=DATA, **options)
    assert small.provenance["prunings"] == [{"seed": 0, **entry}]
    assert checkpoint.load(checkpoint.save(small, tmp_path / "x")).provenance["prunings"] == [{"seed": 0, **entry}]
