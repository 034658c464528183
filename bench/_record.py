"""What a benchmark leaves behind: its rows as JSON and CSV, and in the JSON what a number must travel with."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from prunevit.machine import installed, machine


def environment(dtype: str, **more: Any) -> dict[str, Any]:
    """The machine, the versions, the dtype, the commit and the command."""
    here = machine()
    facts: dict[str, Any] = {
        **here,
        "versions": {name: found or "not installed" for name, found in here["versions"].items()},
        **more,
        "dtype": dtype,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"triton": installed("triton"), "cuda": torch.version.cuda}
        facts |= {"sm": 10 * gpu.major + gpu.minor, "multiprocessors": gpu.multi_processor_count}
    return facts


def _commit() -> str:
    """Of the checkout; where a copy has no history, what PRUNEVIT_COMMIT says."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PRUNEVIT_COMMIT", "unknown")


def write(record: dict[str, Any], file: Path) -> None:
    """``file``, which ends in .json, and its rows beside it as .csv."""
    rows = record["rows"]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
