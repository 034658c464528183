"""What a save writes, and what of the directory it leaves alone."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

from prunevit import _atomic, checkpoint
from prunevit.errors import CheckpointError
from tests.specs import SPECS, random_model

from .directories import FILES, saved


def test_what_is_on_disk(tmp_path: Path) -> None:
    saved(tmp_path / "vit", "distilled")
    assert sorted(os.listdir(tmp_path / "vit")) == FILES
    assert os.listdir(tmp_path) == ["vit"]
    config = json.loads((tmp_path / "vit" / "config.json").read_text("utf-8"))
    assert list(config) == [
        *("architecture", "num_classes", "num_features", "global_pool"),
        *("pretrained_cfg", "model_args", "prunevit"),
    ]
    assert config["pretrained_cfg"]["classifier"] == ["head", "head_dist"]
    assert config["prunevit"]["method"] == "snp"
    with safe_open(tmp_path / "vit" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "vit").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_modes_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for _ in range(2):
            saved(tmp_path / "vit")
            assert {file.stat().st_mode & 0o777 for file in (tmp_path / "vit").iterdir()} == {0o666 & ~umask}
    finally:
        os.umask(before)


def test_replacing_keeps_other_files_and_drops_the_old_plan(tmp_path: Path) -> None:
    saved(tmp_path / "vit")
    (tmp_path / "vit" / "notes").mkdir()
    (tmp_path / "vit" / "notes" / "log.txt").write_text("kept")
    (tmp_path / "vit" / "link").symlink_to("nowhere")
    model = random_model(SPECS["uniform"])
    checkpoint.save(model, tmp_path / "vit")
    assert sorted(os.listdir(tmp_path / "vit")) == ["config.json", "link", "model.safetensors", "notes"]
    assert (tmp_path / "vit" / "notes" / "log.txt").read_text() == "kept"
    assert checkpoint.load(tmp_path / "vit").plan is None
    assert os.listdir(tmp_path) == ["vit"]


def test_a_name_in_other_letters_is_another_file_only_where_it_is_one(tmp_path: Path) -> None:
    saved(tmp_path / "vit")
    (tmp_path / "vit/Plan.json").hardlink_to(tmp_path / "vit/plan.json")  # as a case-insensitive file system has it
    (tmp_path / "vit/Config.json").write_text("mine")
    checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    assert sorted(os.listdir(tmp_path / "vit")) == ["Config.json", "config.json", "model.safetensors"]


def test_what_is_written_beside_during_a_save_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that others make, change and hold open while the directories change places."""
    saved(tmp_path / "vit")
    inside = tmp_path / "vit"
    (inside / "runs/first").mkdir(parents=True)
    for name in ("changed.txt", "changed_later.txt", "open.txt"):
        (inside / name).write_text("old")
    inner = _atomic.exchange

    def busy(fresh: Path, path: Path) -> None:
        (inside / "late.txt").write_text("late")
        (inside / "new.txt").write_text("new")
        (inside / "new.txt").replace(inside / "changed.txt")
        (inside / "runs/first/log.txt").write_text("log")
        inner(fresh, path)
        (inside / "runs/second").mkdir(parents=True)
        (inside / "newer.txt").write_text("newer")
        (inside / "newer.txt").replace(inside / "changed_later.txt")

    monkeypatch.setattr(_atomic, "exchange", busy)
    with (inside / "open.txt").open("a") as stream:
        saved(inside, "uniform")
        stream.write(" and more")
    texts = {file.name: file.read_text() for file in inside.rglob("*.txt")}
    assert texts == {
        "late.txt": "late",
        "changed.txt": "new",
        "changed_later.txt": "newer",
        "open.txt": "old and more",
        "log.txt": "log",
    }
    assert (inside / "runs/second").is_dir()
    assert os.listdir(tmp_path) == ["vit"]


def test_other_files_are_neither_read_nor_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vit")
    os.mkfifo(tmp_path / "vit/pipe")  # whoever opens it waits for a writer
    (tmp_path / "vit/runs").mkdir(mode=0o555)
    for i in range(100):
        (tmp_path / f"vit/runs/{i}.txt").write_text("x")
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    assert len(flushed) < 6
    assert sorted(os.listdir(tmp_path / "vit")) == ["config.json", "model.safetensors", "pipe", "runs"]
    assert len(os.listdir(tmp_path / "vit/runs")) == 100
    assert (tmp_path / "vit/runs").stat().st_mode & 0o777 == 0o555


def test_what_cannot_follow_stays_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vit")
    (tmp_path / "vit/runs").mkdir()
    (tmp_path / "vit/runs/log.txt").write_text("kept")
    inner = Path.rename

    def busy(source: Path, target: Path) -> Path:
        if source.name == "runs":
            raise OSError(16, "Device or resource busy", str(source))
        return inner(source, target)

    monkeypatch.setattr(Path, "rename", busy)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"resource busy: '.*\.vit\.saving-\w+/runs'"):
            saved(tmp_path / "vit")
        (tmp_path / "vit/runs").mkdir(exist_ok=True)
        monkeypatch.undo()
        saved(tmp_path / "vit")
        assert (tmp_path / "vit/runs/log.txt").read_text() == "kept"
        assert os.listdir(tmp_path) == ["vit"]
        monkeypatch.setattr(Path, "rename", busy)


def test_directories_of_similar_names_are_left_alone(tmp_path: Path) -> None:
    for name in (".vit.previous", ".vit.saving-mine", ".vit.writing-mine"):
        (tmp_path / name).mkdir()
    saved(tmp_path / "vit")
    saved(tmp_path / "vit")
    assert sorted(os.listdir(tmp_path)) == [".vit.previous", ".vit.saving-mine", ".vit.writing-mine", "vit"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to any group")
def test_the_group_and_mode_of_the_directory_stay(tmp_path: Path) -> None:
    saved(tmp_path / "vit")
    os.chown(tmp_path / "vit", -1, 1234)
    (tmp_path / "vit").chmod(0o2770)
    saved(tmp_path / "vit")
    assert (tmp_path / "vit").stat().st_mode & 0o7777 == 0o2770
    assert {file.stat().st_gid for file in (tmp_path / "vit", *(tmp_path / "vit").iterdir())} == {1234}


def test_a_directory_that_nobody_may_write_in_stays_one(tmp_path: Path) -> None:
    saved(tmp_path / "vit")
    (tmp_path / "vit/runs").mkdir()
    (tmp_path / "vit").chmod(0o555)
    saved(tmp_path / "vit")
    assert (tmp_path / "vit").stat().st_mode & 0o7777 == 0o555
    assert sorted(os.listdir(tmp_path / "vit")) == [*FILES, "runs"]


def test_nobody_else_reads_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes, inner = [], os.fsync

    def looked_at(handle: int) -> None:
        modes.extend(folder.stat().st_mode & 0o777 for folder in tmp_path.glob(".vit.writing-*"))
        inner(handle)

    monkeypatch.setattr(os, "fsync", looked_at)
    for want in (0o755, 0o700):
        saved(tmp_path / "vit")
        (tmp_path / "vit").chmod(want)
        saved(tmp_path / "vit")
        assert (tmp_path / "vit").stat().st_mode & 0o777 == want
    assert set(modes) == {0o700}


def test_a_group_that_cannot_be_given_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chown(*_: object) -> None:  # EINVAL: of a group that a container's user namespace does not know
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    saved(tmp_path / "vit")
    monkeypatch.setattr(os, "chown", chown)
    saved(tmp_path / "vit", "uniform")
    assert checkpoint.load(tmp_path / "vit").spec == SPECS["uniform"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, mode: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    for seed in range(2):
        saved(tmp_path / "vit", seed=seed)
    (tmp_path / "vit").rename(tmp_path / ".vit.previous-0123abcd")
    saved(tmp_path / ".vit.saving-0123abcd")
    saved(tmp_path / "vit", "uniform")
    assert checkpoint.load(tmp_path / "vit").spec == SPECS["uniform"]
    assert sorted(os.listdir(tmp_path)) == [".vit.saving-0123abcd", "vit"], "it may be of a save under way"


def test_parents_are_made_and_links_followed(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "b" / "vit")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "vit")
    saved(tmp_path / "link", "uniform")
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.load(tmp_path / "a" / "b" / "vit").spec == SPECS["uniform"]
