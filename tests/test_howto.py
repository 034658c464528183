"""The how-to pages do what they say: every command and every line of Python in their blocks runs, beside a model.

Benchmarks of the checkout (`python bench/…`) take minutes, and need only be there.

A page's names stand for small things: ``deit_small_snp`` is a tiny checkpoint, ``DIR`` a folder of class folders. What
would come from a hub is the tiny dense model, and long trainings are one epoch.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from typer.testing import CliRunner

import prunevit
from prunevit.cli import app
from tests.clock import count_macs

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs/how-to").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NAME = re.compile(r"(?<![\w.])prunevit(?:\.[A-Za-z_]\w*)+")
STANDS_FOR = {
    "deit_small_patch16_224.fb_in1k": "dense",
    "--epochs 30": "--epochs 1",
    "--tau 0.01": "--tau 1",
    "--batch 1,8": "--batch 1 --peers eager --no-dense --rounds 1 --seconds 0.05",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for given."""
    folder = tmp_path_factory.mktemp("howto")
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=16, patch_size=8, num_classes=3, embed_dim=24, depth=2, num_heads=2)
    prunevit.save(prunevit.from_timm(dense), folder / "dense")
    pruned = prunevit.prune(dense, method="magnitude", constraints={"macs": "60%"})
    prunevit.save(pruned, folder / "deit_small_snp")
    pixels = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (folder / "DIR" / name).mkdir(parents=True)
        for i in range(30):
            picture = Image.fromarray(pixels.integers(0, 256, (20, 20, 3), dtype=np.uint8))
            picture.save(folder / "DIR" / name / f"{i}.jpg")
    for name in ("photo.jpg", "other.jpg"):
        shutil.copy(folder / "DIR/cat/0.jpg", folder / name)
    return folder


def commands(block: str) -> list[list[str]]:
    for name, meaning in STANDS_FOR.items():
        block = block.replace(name, meaning)
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_there_are_pages() -> None:
    assert {"explain", "bench", "export", "import"} <= {page.stem for page in PAGES}


def test_every_name_that_a_page_gives_is_there() -> None:
    pages = [page.read_text("utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))]
    code = [block for page in pages for language, block in FENCE.findall(page) if language == "python"]
    used = sorted({name for block in code for name in NAME.findall(block)})
    told = sorted({name for page in pages for name in NAME.findall(page)})
    assert "prunevit.pruning.recover" in used
    # in a process of its own: what another test has imported would hide that a reader's `import prunevit` does not
    script = f"import pkgutil, prunevit\nfor name in {used}: eval(name)\nfor name in {told}: pkgutil.resolve_name(name)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(world, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count_macs(monkeypatch)  # a model so small takes no less time for being pruned
    names: dict[str, object] = {}
    for number, (language, block) in enumerate(FENCE.findall(page.read_text("utf-8"))):
        where = f"{page.name}, block {number}"
        if language == "python":
            exec(compile(block, where, "exec"), names)
            continue
        assert language in ("", "sh"), f"{where}: expected python or sh, got {language}"
        for words in commands(block):
            if words[:1] == ["python"]:  # a benchmark of the checkout, which takes minutes: it must at least be there
                assert (ROOT / words[1]).is_file(), f"{where}: {words}"
                continue
            assert words[0] == "prunevit", f"{where}: {words}"
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, f"{where}: {shlex.join(words)}\n{done.output}\n{done.exception!r}"
