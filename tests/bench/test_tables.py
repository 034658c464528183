"""The benchmarks' tables, drawn from the committed results on a terminal of eighty columns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("COLUMNS", "80")


def rows_of(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((BENCH / "results" / f"{name}-cpu.json").read_text("utf-8"))["rows"]
    return rows


@pytest.mark.parametrize("op", ["ragged_attention", "fused_mlp", "norm_linear"])
def test_an_ops_table_shows_every_number_whole(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    import _ops

    rows = rows_of(op)
    _ops.show(rows)
    shown = capsys.readouterr().out.split()
    assert "…" not in "".join(shown)
    for row in rows:
        assert f"{row['us']:.0f}" in shown


def test_the_models_table_shows_every_number_whole(capsys: pytest.CaptureFixture[str]) -> None:
    import model

    rows = rows_of("model")
    Console().print(model.table_of(rows))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    for row in (row for row in rows if row["impl"] == "prunevit"):
        want = row["shape"], f"{row['ms_p50']:.1f}", row["best_peer"], f"{row['macs_ratio']:.2f}"
        assert any(set(want) <= set(line.split()) for line in lines)


def test_what_an_op_takes_travels_with_its_machine(tmp_path: Path) -> None:
    quick = ("--shapes", "snp_deit_tiny", "--batch", "1", "--impls", "prunevit")
    command = [sys.executable, str(BENCH / "fused_mlp.py"), *quick, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "fused_mlp-cpu.json").read_text("utf-8"))
    facts = record["environment"]
    assert {"cpu", "gpu", "versions", "python", "threads", "dtype", "commit", "command"} <= set(facts)
    assert "fused_mlp.py --shapes snp_deit_tiny" in facts["command"]
    lines = (tmp_path / "fused_mlp-cpu.csv").read_text("utf-8").splitlines()
    assert len(lines) == 1 + len(record["rows"]) > 1
