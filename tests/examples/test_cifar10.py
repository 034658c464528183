"""The CIFAR-10 example on a few generated images: the whole grid, a kill in the middle, and the report."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cifar10"
SMALL = shlex.split(
    "--threads 1 --image 8 --width 16 --small-width 8 --depth 2 --heads 2 --epochs 1 --batch 16 --compiled 0 --steps 4 "
    "--gohsp-stages 2 --gohsp-stage-steps 1 --rounds 2 --auto-tau 0.9 --auto-round-steps 1 --auto-images 20 "
    "--others 0.7 --cuts 0.8 --ratios 0.5 --seeds 1 --calibration 16 --probed 20"
)

Load = Callable[[str], ModuleType]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """The example's modules, which lie beside one another and not in a package."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXAMPLE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    chance = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in range(10):
            folder = root / split / f"class{name}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = chance.integers(0, 255, (8, 8, 3), dtype=np.uint8) // 2 + 12 * name
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_a_killed_grid_goes_on_and_is_reported(
    data: Path, tmp_path: Path, module: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(script: str, *options: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
        module(script).main()
        return capsys.readouterr().out

    out, journal = tmp_path / "out", tmp_path / "out" / "journal.jsonl"
    options = ["--data", str(data), "--out", str(out), *SMALL]
    first = subprocess.Popen(
        [sys.executable, EXAMPLE / "run.py", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text("utf-8").count("\n") > 4):
        assert first.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = journal.read_text("utf-8").splitlines()

    with journal.open("a", encoding="utf-8") as file:
        file.write('{"cell": {"stage": "cu')  # a line that the kill cut short
    said = call("run", *options, "--json")
    lines = journal.read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines[1:]]
    assert lines[: len(done) - 1] == done[:-1], "what was measured before the kill is not measured again"
    found = [json.dumps(record["cell"]) for record in records]
    assert len(found) == len(set(found))
    assert json.loads(said.splitlines()[-1]) == {"cells": len(found), "missing": []}

    page = tmp_path / "page.md"
    names = ("main", "budgets", "cut", "kinds", "maps", "agreement", "auto", "claims", "setup")
    page.write_text(
        "before\n" + "".join(f"<!-- table: cifar10-{n} -->\n<!-- end -->\n" for n in names) + "after\n", "utf-8"
    )
    call("latency", "--out", out, "--rounds", "1", "--seconds", "0", "--threads", "1")
    written = {"--results": tmp_path / "results.json", "--page": page, "--picture": tmp_path / "picture.png"}
    call("report", "--out", out, *(part for pair in written.items() for part in pair))
    text = page.read_text("utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| magnitude |" in text
    assert "ms" in text
    assert Image.open(tmp_path / "picture.png").size[0] > 1000

    first_cell, facts = records[0]["cell"], records[0]["facts"]
    assert first_cell["stage"] == "dense"
    assert facts["macs_share"] == 1
    for record in records:
        if (
            record["cell"]["stage"] == "recovered"
            and record["cell"]["method"] != "dense"
            and "steps" in record["facts"]
        ):
            assert record["facts"]["macs_share"] <= record["cell"]["budget"]
            assert record["facts"]["steps"] >= 4, "every method gets as many steps"


def test_a_journal_belongs_to_one_setting(module: Load, tmp_path: Path) -> None:
    journal = module("journal")
    path = tmp_path / "journal.jsonl"
    journal.Journal(path, {"setting": {"epochs": 1}}).add({"stage": "cut"}, {"accuracy": 0.5})
    assert journal.Journal(path, {"setting": {"epochs": 1}}).facts({"stage": "cut"}) == {"accuracy": 0.5}
    with pytest.raises(SystemExit, match="epochs"):
        journal.Journal(path, {"setting": {"epochs": 2}})


def test_augmented_images_are_cuts_of_the_padded_image(module: Load) -> None:
    import torch

    images = module("images")
    pixels = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).expand(40, 3, 8, 8) + 1
    got = images.cut_and_flip(pixels, torch.Generator().manual_seed(3))
    padded = torch.nn.functional.pad(pixels[0], [4] * 4)
    cuts = [padded[:, y : y + 8, x : x + 8] for y in range(9) for x in range(9)]
    allowed = {tuple(cut.flatten().tolist()) for cut in cuts} | {tuple(cut.flip(2).flatten().tolist()) for cut in cuts}
    found = {tuple(image.flatten().tolist()) for image in got}
    assert found <= allowed
    assert len(found) > 20


def test_macs_at_equal_accuracy_are_interpolated(module: Load) -> None:
    macs_at = module("tables").macs_at
    curve = [(1.0, 0.8), (0.5, 0.6), (0.25, 0.2)]
    assert macs_at(0.7, curve) == pytest.approx(0.75)
    assert macs_at(0.4, curve) == pytest.approx(0.375)
    assert macs_at(0.9, curve) is None
    assert macs_at(0.1, curve) is None


def test_an_accuracy_outside_the_rivals_is_no_share_of_macs(module: Load) -> None:
    equal_accuracy, curve = module("tables").equal_accuracy, [(1.0, 0.8), (0.5, 0.6), (0.25, 0.2)]
    assert equal_accuracy({"accuracy": 0.7, "macs_share": 0.6}, curve) == "80%"
    below = equal_accuracy({"accuracy": 0.1, "macs_share": 0.2}, curve)
    assert below == "accuracy 10.0%; the rival's is 20.0% at 25% of the MACs"
    above = equal_accuracy({"accuracy": 0.9, "macs_share": 0.9}, curve)
    assert above == "accuracy 90.0%; the rival's is 80.0% at 100% of the MACs"


def test_the_page_has_the_tables_of_the_committed_results(module: Load) -> None:
    tables, documented = module("tables"), module("page")
    record: Any = json.loads((EXAMPLE / "results" / "results.json").read_text("utf-8"))
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert all(f"<!-- table: {name} -->" in page for name in documented.TABLES)
    assert documented.fill(page, tables.Results(record)) == page, "run examples/cifar10/report.py"
