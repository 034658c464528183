"""Checkpoints: what is saved comes back, whole or not at all; a hostile directory is refused by name."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from prunevit import _atomic, api, checkpoint
from prunevit.errors import CheckpointError, PrunevitError, SpecError
from prunevit.models import PrunedViT
from tests import crashing
from tests.specs import SPECS, random_images, random_model

FILES = ["config.json", "model.safetensors", "plan.json"]


def saved(directory: Path, name: str = "every_head_its_own_width", seed: int = 0) -> PrunedViT:
    model = random_model(SPECS[name], seed)
    model.plan = {"heads": {"blocks.0": [0, 2]}, "seed": seed}
    model.provenance = {"base_model": "deit_tiny_patch16_224", "method": "snp", "accuracy": 0.72}
    checkpoint.save(model, directory)
    return model


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8"))
    change(config)
    file.write_text(json.dumps(config), "utf-8")


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
    for name in (".vit.previous", ".vit.saving-mine"):
        (tmp_path / name).mkdir()
    saved(tmp_path / "vit")
    saved(tmp_path / "vit")
    assert sorted(os.listdir(tmp_path)) == [".vit.previous", ".vit.saving-mine", "vit"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file to any group")
def test_the_group_and_mode_of_the_directory_stay(tmp_path: Path) -> None:
    saved(tmp_path / "vit")
    os.chown(tmp_path / "vit", -1, 1234)
    (tmp_path / "vit").chmod(0o2770)
    saved(tmp_path / "vit")
    assert (tmp_path / "vit").stat().st_mode & 0o7777 == 0o2770
    assert {file.stat().st_gid for file in (tmp_path / "vit", *(tmp_path / "vit").iterdir())} == {1234}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, mode: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    for seed in range(2):
        saved(tmp_path / "vit", seed=seed)
    (tmp_path / "vit").rename(tmp_path / ".vit.previous-0123abcd")
    saved(tmp_path / "vit", "uniform")
    assert checkpoint.load(tmp_path / "vit").spec == SPECS["uniform"]
    assert os.listdir(tmp_path) == ["vit"]


def test_parents_are_made_and_links_followed(tmp_path: Path) -> None:
    saved(tmp_path / "a" / "b" / "vit")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b" / "vit")
    saved(tmp_path / "link", "uniform")
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.load(tmp_path / "a" / "b" / "vit").spec == SPECS["uniform"]


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


def test_a_broken_directory_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "vit")
    (tmp_path / "vit/model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected a file, got none"):
        checkpoint.load(tmp_path / "vit")


# -- what cannot be saved


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


# -- crashes


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
            with pytest.raises(CheckpointError, match=f"the old one is {previous}"):
                checkpoint.load(directory)
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


def test_a_directory_taken_for_stale_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = os.open
    seen = []

    def late(path: Any, *args: Any, **kwargs: Any) -> int:
        if ".saving-" in str(path) and not seen:
            seen.append(path)
            shutil.rmtree(path)  # as another save would, which finds no lock on it
        return inner(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", late)
    saved(tmp_path / "vit")
    assert seen
    assert os.listdir(tmp_path) == ["vit"]


# -- attacks: each takes a good directory and makes it bad


def _header(directory: Path) -> tuple[dict[str, Any], bytes]:
    raw = (directory / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _with_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = _header(directory)
    change(header)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _with_state(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda d: (d / name).write_bytes(content)


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda d: edit(d, change)


def _spec(**fields: Any) -> Callable[[Path], object]:
    return lambda d: edit(d, lambda c: c["model_args"]["spec"].update(fields))


def _huge_sparse(name: str, size: int) -> Callable[[Path], object]:
    def grow(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.truncate(size)

    return grow


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


QKV = "blocks.0.attn.qkv.weight"
ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_directory": (lambda d: shutil.rmtree(d), "expected a checkpoint directory, got none"),
    "no_config": (lambda d: (d / "config.json").unlink(), r"config\.json: expected a readable file"),
    "config_is_a_directory": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        r"config\.json: expected a readable file",
    ),
    "config_empty": (_write("config.json", b""), r"config\.json: expected JSON"),
    "config_truncated": (
        lambda d: (d / "config.json").write_bytes((d / "config.json").read_bytes()[:200]),
        r"config\.json: expected JSON",
    ),
    "config_not_text": (_write("config.json", b"\xff\xfe\x00{"), r"config\.json: expected JSON"),
    "config_a_list": (_write("config.json", b"[]"), r"config\.json: expected a JSON object, got list"),
    "config_a_pickle": (_write("config.json", b"\x80\x04cos\nsystem\n."), r"config\.json: expected JSON"),
    "config_nested_deep": (_write("config.json", b'{"a":' * 200_000), r"config\.json: expected JSON"),
    "config_number_with_a_million_digits": (
        _write("config.json", b'{"num_classes":' + b"9" * 1_000_000 + b"}"),
        r"config\.json: expected JSON",
    ),
    "config_with_nan": (_write("config.json", b'{"num_classes": NaN}'), r"config\.json: expected JSON.*NaN"),
    "config_with_one_key_twice": (_write("config.json", b'{"a": 1, "a": 2}'), "one key twice"),
    "config_of_a_gigabyte": (_huge_sparse("config.json", 2**30), r"config\.json: expected at most 16777216 bytes"),
    "another_architecture": (_config(lambda c: c.update(architecture="resnet50")), "architecture: expected 'prunevit'"),
    "no_model_args": (_config(lambda c: c.pop("model_args")), "model_args: expected an object"),
    "arguments_beside_the_spec": (
        _config(lambda c: c["model_args"].update(num_classes=5)),
        r"model_args\.num_classes: expected nothing but the spec, got 5",
    ),
    "spec_with_a_million_unknown_fields": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update({f"x{i}": 0 for i in range(200_000)})),
        r"expected at most 64 fields an object, got 2000\d\d",
    ),
    "spec_with_a_million_wrong_numbers": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update(attn_reads=[-1] * 65536)),
        r"blocks\.0\.attn_reads\.0: ",
    ),
    "no_spec": (_config(lambda c: c["model_args"].pop("spec")), "spec: expected an object"),
    "spec_a_list": (_config(lambda c: c["model_args"].update(spec=[])), "spec: expected an object"),
    "provenance_a_text": (_config(lambda c: c.update(prunevit="snp")), "prunevit: expected an object"),
    "later_format": (_spec(format_version=2), r"format_version: written by a later prunevit"),
    "spec_with_an_unknown_field": (_spec(code="import os"), r"code: Extra inputs"),
    "spec_of_absurd_width": (_spec(embed_dim=2**40), "embed_dim"),
    "spec_of_a_head_that_no_kernel_takes": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update(qk_dims=[129])),
        r"config\.json: model_args\.spec: .*blocks\.0\.qk_dims\.0: .* 128, got 129",
    ),
    "spec_larger_than_its_file": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update(mlp_dim=2**18)),
        r"model\.safetensors: expected at least \d+ bytes for \d+ parameters",
    ),
    "classes_not_the_specs": (_config(lambda c: c.update(num_classes=8)), "num_classes: expected 7 as the spec has"),
    "features_not_the_specs": (_config(lambda c: c.update(num_features=8)), "num_features: expected 29"),
    "pooling_not_the_specs": (_config(lambda c: c.update(global_pool="avg")), "global_pool: expected 'token'"),
    "no_pretrained_cfg": (_config(lambda c: c.pop("pretrained_cfg")), "pretrained_cfg: expected an object"),
    "input_size_not_the_specs": (
        _config(lambda c: c["pretrained_cfg"].update(input_size=[3, 64, 64])),
        r"pretrained_cfg\.input_size: expected \[3, 12, 16\]",
    ),
    "input_size_missing": (_config(lambda c: c["pretrained_cfg"].pop("input_size")), r"pretrained_cfg\.input_size"),
    "mean_a_text": (_config(lambda c: c["pretrained_cfg"].update(mean="0.5")), r"pretrained_cfg\.mean"),
    "deviation_zero": (_config(lambda c: c["pretrained_cfg"].update(std=[0, 0, 0])), r"pretrained_cfg\.std\.0"),
    "deviation_tiny": (_config(lambda c: c["pretrained_cfg"].update(std=[1e-300])), r"pretrained_cfg\.std\.0"),
    "mean_of_texts": (_config(lambda c: c["pretrained_cfg"].update(mean=["0.5"] * 3)), r"pretrained_cfg\.mean\.0"),
    "means_of_other_channels": (
        _config(lambda c: c["pretrained_cfg"].update(mean=[0.5] * 5)),
        r"pretrained_cfg\.mean: expected one value, or 3 as the spec has channels, got 5",
    ),
    "crop_of_a_hundredth": (_config(lambda c: c["pretrained_cfg"].update(crop_pct=0.01)), r"pretrained_cfg\.crop_pct"),
    "crop_negative": (_config(lambda c: c["pretrained_cfg"].update(crop_pct=-1)), r"pretrained_cfg\.crop_pct"),
    "labels_numbers": (_config(lambda c: c["pretrained_cfg"].update(label_names=[1])), r"pretrained_cfg\.label_names"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors: expected a file, got none"),
    "pickled_weights": (
        lambda d: torch.save({QKV: _Bomb()}, d / "model.safetensors"),
        r"model\.safetensors: expected",
    ),
    "weights_empty": (_write("model.safetensors", b""), r"model\.safetensors: expected at least"),
    "weights_truncated": (
        lambda d: _huge_sparse("model.safetensors", (d / "model.safetensors").stat().st_size - 1)(d),
        r"model\.safetensors: expected a safetensors file",
    ),
    "weights_with_a_tail": (
        lambda d: _huge_sparse("model.safetensors", (d / "model.safetensors").stat().st_size + 64)(d),
        r"model\.safetensors: expected a safetensors file",
    ),
    "header_of_absurd_size": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{" * 100_000),
        r"model\.safetensors: expected a safetensors file",
    ),
    "header_not_json": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 100) + b"\xff" * 100_000),
        r"model\.safetensors: expected a safetensors file",
    ),
    "offsets_beyond_the_file": (
        lambda d: _with_header(d, lambda h: h[QKV].update(data_offsets=[0, 2**50])),
        r"model\.safetensors: expected a safetensors file",
    ),
    "offsets_that_overlap": (
        lambda d: _with_header(d, lambda h: h[QKV].update(data_offsets=h["blocks.0.attn.qkv.bias"]["data_offsets"])),
        r"model\.safetensors: expected a safetensors file",
    ),
    "shape_that_overflows": (
        lambda d: _with_header(d, lambda h: h[QKV].update(shape=[2**40, 2**40])),
        r"model\.safetensors: expected a safetensors file",
    ),
    "shape_transposed": (
        lambda d: _with_header(d, lambda h: h[QKV].update(shape=h[QKV]["shape"][::-1])),
        r"blocks\.0\.attn\.qkv\.weight: expected shape \[60, 29\], got \[29, 60\]",
    ),
    "tensor_missing": (
        lambda d: _with_state(d, lambda s: s.update({"padding": s.pop(QKV)})),
        r"blocks\.0\.attn\.qkv\.weight: expected a tensor \[60, 29\], which is missing",
    ),
    "tensor_extra": (
        lambda d: _with_state(d, lambda s: s.update(payload=torch.zeros(3))),
        r"payload: expected no such tensor of this spec, got \[3\]",
    ),
    "tensor_of_integers": (
        lambda d: _with_state(d, lambda s: s.update({QKV: s[QKV].to(torch.int32)})),
        r"blocks\.0\.attn\.qkv\.weight: expected one of F64, F32, F16, BF16, the same for all, got I32",
    ),
    "tensor_of_another_dtype": (
        lambda d: _with_state(d, lambda s: s.update({QKV: s[QKV].double()})),
        r"expected one of F64, F32, F16, BF16, the same for all",
    ),
    "weights_nan": (
        lambda d: _with_state(d, lambda s: s[QKV].view(-1)[7:8].fill_(float("nan"))),
        r"blocks\.0\.attn\.qkv\.weight: expected finite weights",
    ),
    "weights_infinite": (
        lambda d: _with_state(d, lambda s: s["pos_embed"].view(-1)[0:1].fill_(float("-inf"))),
        "pos_embed: expected finite weights",
    ),
    "plan_truncated": (_write("plan.json", b'{"heads": '), r"plan\.json: expected JSON"),
    "plan_of_a_gigabyte": (_huge_sparse("plan.json", 2**30), r"plan\.json: expected at most 16777216 bytes"),
    "plan_a_pipe": (
        lambda d: ((d / "plan.json").unlink(), os.mkfifo(d / "plan.json")),
        r"plan\.json: expected a regular file",
    ),
    "plan_a_list": (_write("plan.json", b"[]"), r"plan\.json: expected a JSON object"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_before_memory_is_allocated(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = ATTACKS[attack]
    saved(tmp_path / "vit")
    change(tmp_path / "vit")

    def built(spec: object, *, device: str | None = None) -> PrunedViT:
        assert device == "meta", "a model was allocated"
        return PrunedViT(spec, device=device)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "PrunedViT", built)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises((CheckpointError, SpecError), match=message) as caught:
        checkpoint.load(tmp_path / "vit")
    assert len(str(caught.value)) < 1000


def test_the_attacked_directory_was_good(tmp_path: Path) -> None:
    """Else the attacks above would be refused for another reason."""
    saved(tmp_path / "vit")
    edit(tmp_path / "vit", lambda c: c)
    _with_state(tmp_path / "vit", lambda s: s)
    _with_header(tmp_path / "vit", lambda h: h)
    checkpoint.load(tmp_path / "vit")


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_byte_loads_or_is_refused_by_name(file: str, tmp_path: Path) -> None:
    saved(tmp_path / "vit", "one_head_13_by_12")
    good = (tmp_path / "vit" / file).read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, min(len(good), 3000), (60,), generator=generator).tolist()
    refused = 0
    for place in places:
        (tmp_path / "vit" / file).write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        try:
            checkpoint.load(tmp_path / "vit")
        except PrunevitError:
            refused += 1
    assert refused > 20 or file == "model.safetensors"
