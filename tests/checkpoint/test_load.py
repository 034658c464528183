"""What is saved comes back, whole, also while another save replaces it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from prunevit import checkpoint
from prunevit.errors import CheckpointError
from tests.specs import SPECS, random_images, random_model

from .directories import saved


@pytest.mark.parametrize("name", SPECS)
def test_comes_back(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model = saved(tmp_path / "vit", name)
    again = checkpoint.load(tmp_path / "vit")
    assert again.spec == spec == checkpoint.read_config(tmp_path / "vit").spec
    assert (again.plan, again.training) == (model.plan, False)
    assert again.provenance.items() >= model.provenance.items()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    images = random_images(spec)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))
    again.train()(images).sum().backward()
    assert again.pos_embed.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_keeps_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoint.save(random_model(SPECS["uniform"]).to(dtype), tmp_path / "vit")
    assert {p.dtype for p in checkpoint.load(tmp_path / "vit").parameters()} == {dtype}


def test_a_loaded_model_does_not_follow_its_file(tmp_path: Path) -> None:
    saved(tmp_path / "vit")
    again = checkpoint.load(tmp_path / "vit")
    before = again.pos_embed.detach().clone()
    with (tmp_path / "vit" / "model.safetensors").open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(b"\0" * 4000)
    assert torch.equal(again.pos_embed, before)


@pytest.mark.parametrize("when", ["_read_config", "check_file", "PrunedViT", "safe_open"])
def test_a_save_during_a_load_mixes_nothing(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vit", seed=0)
    inner = getattr(checkpoint, when)

    def busy(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(checkpoint, when, inner)
        for seed, name in enumerate(("uniform", "every_head_its_own_width"), 1):  # twice: numbers of files come again
            saved(tmp_path / "vit", name, seed=seed)
        return inner(*args, **kwargs)

    monkeypatch.setattr(checkpoint, when, busy)
    model = checkpoint.load(tmp_path / "vit")
    assert model.plan is not None
    assert model.plan["seed"] == 2
    assert torch.equal(model.pos_embed, random_model(model.spec, seed=2).pos_embed)


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="only Linux opens a directory without reading it")
def test_a_directory_that_may_be_searched_but_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vit")
    inner = os.open

    def unlisted(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if Path(path).is_dir() and not flags & os.O_PATH:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return inner(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", unlisted)
    assert checkpoint.load(tmp_path / "vit").plan is not None


def test_a_broken_directory_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vit")
    (tmp_path / "vit/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected a file, got none"):
        checkpoint.load(tmp_path / "vit")
