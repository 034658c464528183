"""What cannot be saved, or not there, is refused before anything is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from prunevit import api, checkpoint
from prunevit.errors import CheckpointError
from prunevit.models import PrunedViT
from tests.specs import SPECS, random_model

from .directories import FILES, saved


def _nan(model: PrunedViT) -> None:
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")


def _another_shape(model: PrunedViT) -> None:
    model.head = torch.nn.Linear(29, 8)


def _tensor_in_the_plan(model: PrunedViT) -> None:
    model.plan = {"heads": torch.zeros(3)}


def _nan_in_the_provenance(model: PrunedViT) -> None:
    model.provenance = {"accuracy": float("nan")}


def _cfg(**fields: Any) -> Callable[[PrunedViT], None]:
    return lambda model: setattr(model, "pretrained_cfg", fields)


def _provenance(value: dict[Any, Any]) -> Callable[[PrunedViT], None]:
    return lambda model: setattr(model, "provenance", value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_provenance({"log": "x" * 2**24}), "config: expected at most 16777216 bytes"),
        (_provenance({1: "a", "1": "b"}), "config: expected JSON, got an object with one key twice"),
        (_provenance({"base_model": "caf\udce9"}), "config: expected plain JSON values"),
        (_cfg(label_names=[1, 2]), r"config: pretrained_cfg\.label_names"),
        (_cfg(crop_pct=0.0), r"config: pretrained_cfg\.crop_pct"),
        (_cfg(std=(0.0, 0.0, 0.0)), r"config: pretrained_cfg\.std\.0"),
        (_cfg(mean=0.5), r"config: pretrained_cfg\.mean"),
        (_cfg(mean=["0.5"] * 5), r"config: pretrained_cfg\.mean\.0"),
        (_nan, r"blocks\.0\.mlp\.fc1\.weight: expected finite weights"),
        (_another_shape, r"head\.weight: expected shape \[7, 29\], got \[8, 29\]"),
        (_tensor_in_the_plan, "plan: expected plain JSON"),
        (_nan_in_the_provenance, "config: expected plain JSON"),
    ],
)
def test_what_cannot_be_read_back_is_not_written(
    change: Callable[[PrunedViT], None], message: str, tmp_path: Path
) -> None:
    model = saved(tmp_path / "vit")
    before = {name: (tmp_path / "vit" / name).read_bytes() for name in FILES}
    change(model)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(model, tmp_path / "vit")
    assert before == {name: (tmp_path / "vit" / name).read_bytes() for name in FILES}
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(model, tmp_path / "new")
    assert os.listdir(tmp_path) == ["vit"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "vit").write_text("precious")
    for path in (tmp_path / "vit", tmp_path / "vit/inside/it"):
        with pytest.raises(CheckpointError, match=r"expected a directory .* a file"):
            saved(path)
    assert (tmp_path / "vit").read_text() == "precious"


@pytest.mark.parametrize("path", ["", ".", "..", "../inside/../..", "{tmp}/work"])
def test_nobody_is_left_in_a_directory_that_is_gone(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work/inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work/inside")
    with pytest.raises(CheckpointError, match=r"got (the current one|one that holds the current one)"):
        saved(Path(path.format(tmp=tmp_path)))
    assert os.listdir() == []
    saved(Path("vit"))
    assert os.listdir() == ["vit"]


@pytest.mark.parametrize("path", ["/", "{tmp}/" + "x" * 300, "{tmp}/a\0b", "x"])
def test_paths_that_cannot_be_are_refused_by_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(CheckpointError, match="expected a directory to write, or nothing yet, got"):
        saved(Path(path.format(tmp=tmp_path)))
    with pytest.raises(CheckpointError, match=r"expected a (checkpoint directory|readable file)"):
        checkpoint.load(Path(path.format(tmp=tmp_path)))
    saved(tmp_path / "vit")
    assert os.listdir(tmp_path) == ["vit"]


def test_a_directory_that_may_not_be_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    monkeypatch.setattr(Path, "exists", denied)
    monkeypatch.setattr(os, "open", denied)
    for use in (lambda path: api.save(random_model(SPECS["uniform"]), path), checkpoint.load):
        with pytest.raises(CheckpointError, match="Permission denied"):
            use(tmp_path / "vit")


def test_where_nothing_can_be_put_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name in ("disk", ""))
    with pytest.raises(CheckpointError, match="a mount point"):
        saved(tmp_path / "disk")
    with pytest.raises(CheckpointError, match=f"one with a mount point in it, .*: {tmp_path}/disk"):
        saved(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match=f"{tmp_path}, which cannot be written in"):
        saved(tmp_path / "deep/vit")
    assert os.listdir(tmp_path) == ["disk"]
    monkeypatch.setattr(api, "gate", lambda model: pytest.fail("the model was run first"))
    with pytest.raises(CheckpointError, match="cannot be written in"):
        api.save(random_model(SPECS["uniform"]), tmp_path / "vit")
