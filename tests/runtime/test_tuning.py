"""tuning.json beside a checkpoint: used on the machine that wrote it, named and left aside on any other."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from prunevit import checkpoint
from prunevit.errors import CheckpointError, InputError, UntunedMachine
from prunevit.runtime import Runtime
from prunevit.runtime.backend import tuned
from prunevit.runtime.runtime import _tuning_file
from prunevit.runtime.tune import tune_runtime
from prunevit_kernels import Target
from prunevit_kernels._configs import Tile
from prunevit_kernels.tuning import Tuning
from tests.specs import SPECS, random_images, random_model

HERE = "a GPU"
KEY = "norm_linear m64 n1 k1 bfloat16"
TARGET = Target("cuda", torch.device("cuda", 0), torch.bfloat16)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("prunevit_kernels.tuning.machine_name", lambda device: HERE)
    return tmp_path / "tuning.json"


def test_this_machines_tiles_are_used(file: Path) -> None:
    Tuning(HERE, {KEY: Tile(64, 32)}).write(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tuned(TARGET, file)
    assert found.tuning is not None
    assert found.tuning.tiles == {KEY: Tile(64, 32)}
    assert TARGET.tuning is None


def test_a_table_of_kernels_alone_is_used_too(file: Path) -> None:
    kernels = {"fused_mlp m64 n1 k1 1 1 bfloat16": "split"}
    Tuning(HERE, kernels=kernels).write(file)
    found = tuned(TARGET, file)
    assert found.tuning is not None
    assert found.tuning.kernels == kernels


@pytest.mark.parametrize("other", ["another GPU", "a GPU with an older triton"])
def test_a_foreign_or_stale_table_is_left_aside_by_name(file: Path, other: str) -> None:
    Tuning(other, {KEY: Tile(64, 32)}).write(file)
    with pytest.warns(UntunedMachine, match=f"tuned on {other}, not on {HERE}.*prunevit.runtime.tune"):
        assert tuned(TARGET, file).tuning is None


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"format": 2, "machines": {}}',
        '{"format": 1, "machines": []}',
        '{"format": 1, "machines": {"a GPU": []}}',
        '{"format": 1, "machines": {"a GPU": {"key": {"block_m": 1000000}}}}',
        '{"format": 1, "machines": {"a GPU": {"fused_mlp m1 n1 k1 1 1 bfloat16": {"kernel": "fast"}}}}',
    ],
    ids=["no_json", "a_list", "format", "machines", "tiles", "a_tile", "a_kernel"],
)
def test_a_malformed_file_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(CheckpointError, match="expected"):
        tuned(TARGET, file)


def test_no_other_backend_reads_it(file: Path) -> None:
    file.write_text("not json")
    cpu = Target("torch")
    assert tuned(cpu, file) is cpu
    assert tuned(TARGET, None) is TARGET


def test_it_lies_in_the_checkpoint_directory(file: Path) -> None:
    model = random_model(SPECS["uniform"])
    directory = file.parent / "model"
    checkpoint.save(model, directory)
    assert _tuning_file(directory, None) is None
    beside = directory / "tuning.json"
    Tuning(HERE, {KEY: Tile(64, 32)}).write(beside)
    assert _tuning_file(directory, None) == _tuning_file(str(directory), None) == beside
    assert _tuning_file(model, None) is None
    Tuning(HERE, {}).write(file)
    assert _tuning_file(directory, file) == file
    with pytest.raises(InputError, match="a tuning file"):
        _tuning_file(model, directory / "nowhere.json")
    images = random_images(SPECS["uniform"])
    assert torch.equal(Runtime(directory, device="cpu")(images), Runtime(model, device="cpu")(images))


def test_only_the_cuda_backend_is_tuned(file: Path) -> None:
    with pytest.raises(InputError, match="the cuda backend to tune"):
        tune_runtime(Runtime(random_model(SPECS["uniform"]), device="cpu"), [1], file)
