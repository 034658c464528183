"""explain, bench and export on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from prunevit.benchmark import Peer

from .conftest import Call


def test_explain(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    page = tmp_path / "where.html"
    found = call("explain", checkpoint, "--rounds", 1, "--batch", 2, "--threads", 1, "--html", page, "--json").json
    assert found["batch"] == 2
    assert found["model"] == str(checkpoint)
    assert found["html"] == str(page)
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert [step["op"] for step in found["steps"]][:2] == ["patch_embed", "norm_linear"]
    told = call("explain", checkpoint, "--rounds", 1, "--backend", "torch")
    assert "PyTorch reference" in told.stdout


def test_explain_of_nothing(call: Call, tmp_path: Path) -> None:
    answer = call("explain", tmp_path / "nowhere")
    assert answer.code == 1
    assert "expected a checkpoint directory" in answer.stderr


def test_bench(call: Call, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_time_passes(peers: list[Peer], *, rounds: int, **_: object) -> None:
        for place, peer in enumerate(peers):
            peer.samples = [[1.0 + place]] * rounds

    monkeypatch.setattr(
        sys.modules["prunevit.benchmark.compare"], "run_interleaved", no_time_passes
    )  # tests/benchmark runs it
    found = call(
        "bench", checkpoint, "--peers", "eager", "--threads", 1, "--rounds", 1, "--seconds", 0.02, "--json"
    ).json  # fmt: skip
    assert [row["impl"] for row in found["rows"]] == ["prunevit", "eager"]
    assert found["machine"]["versions"]["torch"]
    told = call("bench", checkpoint, "--peers", "eager", "--rounds", 2)
    assert "over the best peer, eager:" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(("--batch", "two"), 2, "expected batch sizes"), (("--peers", "tensorflow"), 1, "expected peers out of eager")],
)
def test_bench_refuses(call: Call, checkpoint: Path, arguments: tuple[str, ...], code: int, message: str) -> None:
    answer = call("bench", checkpoint, *arguments)
    assert answer.code == code
    assert message in answer.stderr


def test_export(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the test extra installs it")
    found = call("export", checkpoint, "--format", "onnx", "--out", tmp_path / "tiny.onnx", "--json").json
    assert found["bytes"] == (tmp_path / "tiny.onnx").stat().st_size > 0
    answer = call("export", checkpoint, "--out", tmp_path / "tiny.onnx", "--opset", 11)
    assert answer.code == 1
    assert "opset from 18 to" in answer.stderr
