"""The demo, with its steps capped: it writes what it promises, and its numbers are those of its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from prunevit import api, shapes

from .conftest import Call


def test_the_demo_writes_a_checkpoint_a_picture_and_a_report(call: Call, tmp_path: Path) -> None:
    out = tmp_path / "demo-out"
    answer = call("demo", "--out", out, "--epochs", 2, "--recovery-epochs", 1, "--rounds", 1, "--json")
    assert answer.code == 0
    report = json.loads((out / "report.json").read_text())
    assert report == answer.json
    assert set(report) == {"digits", "deit_small", "environment"}
    dense, pruned, runtime = (report["digits"][name] for name in ("dense", "pruned", "runtime"))
    assert set(dense) == {"accuracy", "params", "macs"}
    assert set(pruned) == {"accuracy", "params", "macs", "method"}
    assert set(runtime) == {"accuracy", "max_error_vs_masked_dense"}
    times = {"dense_eager_ms", "pruned_eager_ms", "pruned_runtime_ms"}
    assert set(report["deit_small"]) == {"macs_ratio"} | times
    assert all(report["deit_small"][name] > 0 for name in times)
    assert report["deit_small"]["macs_ratio"] == pytest.approx(2.037 / 4.608, rel=0.01)
    assert 0.49 * dense["macs"] <= pruned["macs"] <= 0.5 * dense["macs"]
    assert runtime["max_error_vs_masked_dense"] < 1e-3
    assert runtime["accuracy"] == pytest.approx(pruned["accuracy"], abs=0.01)

    model = api.load(out / "checkpoint")
    assert model.spec.macs() == pruned["macs"]
    assert model.spec.params() == pruned["params"]
    assert Image.open(out / "shape.png").size[0] > 1000
    images = sorted((out / "images").glob("*.png"))
    assert [image.stem for image in images] == list("0123456789")
    assert call("run", out / "checkpoint", images[3]).code == 0


def test_the_table_has_every_number(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from prunevit.cli.demo import _table

    part = {"accuracy": 0.9876, "params": 205_000, "macs": 3_500_000}
    report = {
        "digits": {
            "dense": part,
            "pruned": {**part, "macs": 1_750_000, "method": "snp"},
            "runtime": {"accuracy": 0.97, "max_error_vs_masked_dense": 1.5e-6},
        },
        "deit_small": {
            "macs_ratio": shapes.get("snp_deit_small").macs() / shapes.get("deit_small").macs(),
            "dense_eager_ms": 90.0,
            "pruned_eager_ms": 60.0,
            "pruned_runtime_ms": 30.0,
        },
    }
    console = Console(width=160, record=True)
    console.print(_table(report))
    text = console.export_text()
    for shown in ("98.8 %", "97.0 %", "(50 %)", "1.5e-06", "44 %", "90.0 ms", "30.0 ms", "3.00 ×"):
        assert shown in text
