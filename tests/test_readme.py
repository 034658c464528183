"""The README does what it says: its quickstart runs on a model like the demo's, its tables are the measured ones."""

from __future__ import annotations

import json
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import prunevit
from prunevit.cli import app
from prunevit.data import DIGITS_CFG
from tests.test_howto import FENCE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
INSTALLS = ("make", "source")  # what a fresh clone is tried with by hand

QUICK = "--batch 1 --peers eager --no-dense --rounds 1 --seconds 0.05"  # a benchmark's least


@pytest.fixture(scope="module")
def demo_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what ``make demo`` leaves: a pruned digits model and one picture of each class."""
    folder = tmp_path_factory.mktemp("readme")
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=24, depth=2, num_heads=2)
    dense.pretrained_cfg = dict(DIGITS_CFG)
    pruned = prunevit.prune(dense, method="magnitude", constraints={"macs": "60%"})
    prunevit.save(pruned, folder / "demo-out/checkpoint")
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8), dtype=np.uint8)
    (folder / "demo-out/images").mkdir()
    Image.fromarray(pixels).save(folder / "demo-out/images/3.png")
    return folder


def blocks(language: str) -> list[str]:
    return [block for tag, block in FENCE.findall(README) if tag == language]


def test_the_quickstarts_commands_run(demo_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_out)
    lines = [line for i in (1, 3) for line in blocks("sh")[i].splitlines() if not line.startswith(INSTALLS)]
    assert len(lines) == 6
    for line in lines:
        words = shlex.split(line.replace("--batch 1,8", QUICK), comments=True)
        assert words[0] == "prunevit"
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, f"{line}\n{done.output}\n{done.exception!r}"


def test_the_quickstarts_python_runs(demo_out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo_out)
    names: dict[str, object] = {}
    exec(compile(blocks("python")[1], "README.md", "exec"), names)
    assert names["logits"].shape == (4, 10)  # type: ignore[attr-defined]
    assert len(names["best"][0]) == 3  # type: ignore[index]


def test_pruning_a_timm_model_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    create = timm.create_model

    def tiny(name: str, *, pretrained: bool) -> torch.nn.Module:
        assert pretrained, "the README prunes a trained model"
        return create(name, pretrained=False, img_size=32, patch_size=16, embed_dim=36, depth=2, num_heads=2)

    monkeypatch.setattr(timm, "create_model", tiny)
    images = torch.randn(4, 3, 32, 32)
    names: dict[str, object] = {"images": images}
    names["loader"] = DataLoader(TensorDataset(images, torch.arange(4)), batch_size=2)
    exec(compile(blocks("python")[0], "README.md", "exec"), names)
    assert names["logits"].shape == (4, 1000)  # type: ignore[attr-defined]


def test_swapping_blocks_runs_as_written() -> None:
    names: dict[str, object] = {}
    exec(compile(blocks("python")[2], "README.md", "exec"), names)
    assert names["logits"].shape == (1, 1000)  # type: ignore[attr-defined]


def test_the_tables_are_the_measured_ones() -> None:
    fill = runpy.run_path(str(ROOT / "bench/tables.py"))["fill"]
    assert fill(README) == README, "run: python bench/tables.py"
    record = json.loads((ROOT / "bench/results/model-cpu.json").read_text("utf-8"))
    assert record["environment"]["commit"]
    assert record["rows"]
