"""A save that dies, or that others run beside, leaves the old checkpoint or the new one."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from prunevit import _atomic, checkpoint
from prunevit.errors import CheckpointError
from tests import crashing
from tests.specs import SPECS, random_model

from .directories import FILES, saved


@pytest.fixture(scope="module")
def run_until_crash() -> Callable[..., int]:
    """Saves run in children of a fresh process: a fork of this one would inherit torch's threads and hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.crashing"])

    def run(step: int, directory: Path, exchange: str = "exchange") -> int:
        process = context.Process(target=crashing.save_until, args=(step, directory, exchange))
        process.start()
        process.join(60)
        assert process.exitcode in (0, crashing.CRASHED), process.exitcode
        return process.exitcode

    return run


@pytest.mark.parametrize("there_is_an_old_one", [True, False])
def test_a_crash_at_any_step_leaves_the_old_or_the_new(
    there_is_an_old_one: bool, tmp_path: Path, run_until_crash: Callable[..., int]
) -> None:
    seen, step, code = set(), 0, crashing.CRASHED
    while code == crashing.CRASHED:
        directory = tmp_path / str(step) / "vit"
        if there_is_an_old_one:
            saved(directory, seed=0)
            (directory / "notes.txt").write_text("kept")
        else:
            directory.parent.mkdir()
        code = run_until_crash(step, directory)
        if directory.exists():
            model = checkpoint.load(directory)
            seed = 0 if model.plan else 1
            want = random_model(SPECS["every_head_its_own_width"], seed)
            assert all(torch.equal(v, model.state_dict()[k]) for k, v in want.state_dict().items()), step
            assert not there_is_an_old_one or (directory / "notes.txt").read_text() == "kept"
            seen.add("old" if seed == 0 else "new")
        else:
            assert not there_is_an_old_one
            seen.add("none")
        saved(directory, seed=2)
        assert os.listdir(directory.parent) == ["vit"], "the next save removes what the crash left"
        assert sorted(os.listdir(directory)) == sorted([*FILES, "notes.txt"] if there_is_an_old_one else FILES)
        step += 1
    assert seen == ({"old", "new"} if there_is_an_old_one else {"none", "new"})
    assert step > 8


def test_a_crash_where_directories_cannot_be_exchanged(tmp_path: Path, run_until_crash: Callable[..., int]) -> None:
    """Two renames: between them the old one lies under its other name, load says so, the next save restores it."""
    between, step, code = 0, 0, crashing.CRASHED
    while code == crashing.CRASHED:
        directory = tmp_path / str(step) / "vit"
        saved(directory, seed=0)
        code = run_until_crash(step, directory, "rename_twice")
        if not directory.exists():
            between += 1
            (previous,) = directory.parent.glob(".vit.previous-*")
            (tmp_path / "link").symlink_to(directory)
            for path in (directory, tmp_path / "link"):
                with pytest.raises(CheckpointError, match=f"the old one is {previous}"):
                    checkpoint.load(path)
            assert checkpoint.load(previous).plan
        else:
            checkpoint.load(directory)
        saved(directory, seed=2)
        assert os.listdir(directory.parent) == ["vit"]
        step += 1
    assert between == 1


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("call", "error"),
    [("save_file", FULL), ("save_file", SafetensorError(str(FULL))), ("fsync", FULL), ("exchange", FULL)],
)
def test_an_error_while_saving_leaves_the_old(
    call: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    saved(tmp_path / "vit")
    monkeypatch.setattr({"save_file": checkpoint, "fsync": os, "exchange": _atomic}[call], call, full)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "vit").plan is not None
    assert os.listdir(tmp_path) == ["vit"]


def test_a_save_under_way_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes saving to one path: the later wins, neither breaks the other."""
    saved(tmp_path / "vit", seed=0)
    inner = checkpoint.save_file

    def slow(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(checkpoint, "save_file", inner)
        saved(tmp_path / "vit", seed=1)
        inner(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saved(tmp_path / "vit", seed=2)
    assert checkpoint.load(tmp_path / "vit").plan["seed"] == 2  # type: ignore[index]
    assert os.listdir(tmp_path) == ["vit"]


def test_saves_at_once_all_come_through(tmp_path: Path) -> None:
    """Of threads, which take and leave their locks as processes do: each must end with its own or a later one there."""
    saved(tmp_path / "vit")
    (tmp_path / "vit/notes.txt").write_text("kept")
    model = random_model(SPECS["one_head_13_by_12"])
    paths = [tmp_path / "vit"] * 60 + [tmp_path / f"new{i // 4}" for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda path: checkpoint.save(model, path), paths)) == paths
    assert sorted(os.listdir(tmp_path)) == sorted(["vit", *(f"new{i}" for i in range(10))])
    assert (tmp_path / "vit/notes.txt").read_text() == "kept"


def test_what_was_put_there_after_a_crash_stays(tmp_path: Path) -> None:
    """Also where it is older than what the crash left, as a copy with its times is."""
    saved(tmp_path / "vit")
    saved(tmp_path / ".vit.saving-0123abcd")
    for directory in (tmp_path / "vit", tmp_path / ".vit.saving-0123abcd"):
        (directory / "runs").mkdir()
        for name in ("notes.txt", "runs/log.txt"):
            (directory / name).write_text(directory.name)
            os.utime(directory / name, (1, 1) if directory.name == "vit" else None)
    (tmp_path / ".vit.saving-0123abcd/runs/lost.txt").write_text("brought over")
    saved(tmp_path / "vit")
    texts = {file.name: file.read_text() for file in (tmp_path / "vit").rglob("*.txt")}
    assert texts == {"notes.txt": "vit", "log.txt": "vit", "lost.txt": "brought over"}
    assert os.listdir(tmp_path) == ["vit"]


def test_saves_take_turns_where_directories_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes between the two renames of another finds nothing at the path, and waits all the same."""
    saved(tmp_path / "vit")
    (tmp_path / "vit/runs").mkdir()
    inner, later = Path.rename, []

    def slow(source: Path, target: Path) -> Path:
        if target == tmp_path / "vit" and not later:
            later.append(pool.submit(saved, tmp_path / "vit", seed=2))
            wait(later, timeout=1)
        return inner(source, target)

    monkeypatch.setattr(_atomic, "exchange", _atomic.rename_twice)
    monkeypatch.setattr(Path, "rename", slow)
    with ThreadPoolExecutor(1) as pool:
        saved(tmp_path / "vit", seed=1)
        later[0].result()
    assert checkpoint.load(tmp_path / "vit").plan["seed"] == 2  # type: ignore[index]
    assert sorted(os.listdir(tmp_path / "vit")) == [*FILES, "runs"]
    assert os.listdir(tmp_path) == ["vit"]


def test_a_child_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, inherited = _atomic._locked, []

    def forked(path: Path) -> int | None:
        if (handle := inner(path)) is not None:
            inherited.append(os.dup(handle))  # shares the lock, as a child's does
        return handle

    monkeypatch.setattr(_atomic, "_locked", forked)
    for _ in range(2):
        saved(tmp_path / "vit")
        handle = os.open(tmp_path / "vit", os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it would wait
        os.close(handle)
    assert len(inherited) == 3
    for handle in inherited:
        os.close(handle)


def test_a_directory_taken_for_stale_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = os.open
    seen = []

    def late(path: Any, *args: Any, **kwargs: Any) -> int:
        if ".writing-" in str(path) and not seen:
            seen.append(path)
            shutil.rmtree(path)  # as another save would, which finds no lock on it
        return inner(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)
    saved(tmp_path / "vit")
    assert seen
    assert os.listdir(tmp_path) == ["vit"]
