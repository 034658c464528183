"""Write what was measured into the documentation: ``python examples/cifar10/report.py --out DIR``.

The raw results go to examples/cifar10/results/results.json; from that file alone come the tables of docs/methods.md,
between their markers, and docs/images/cifar10-pareto.png. Without --out both are made again from the file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from grid import cells
from page import fill
from picture import draw
from setting import Setting
from tables import Results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results" / "results.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where run.py and latency.py wrote")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "methods.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "cifar10-pareto.png")
    options = parser.parse_args()
    if options.out:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        record = collected(options.out)
        options.results.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    results = Results(json.loads(options.results.read_text("utf-8")))
    options.page.write_text(fill(options.page.read_text("utf-8"), results), "utf-8")
    draw(results, options.picture)
    print(f"{len(results.cells)} cells, {len(results.missing)} missing: {options.page}, {options.picture}")


def collected(out: Path) -> dict[str, Any]:
    """The journal, the latencies, and what is still missing."""
    lines = (out / "journal.jsonl").read_text("utf-8").split("\n")[:-1]
    header, *records = [json.loads(line) for line in lines]
    fields: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in header["setting"].items()}
    setting = Setting(**fields)
    done = [record["cell"] for record in records]
    missing = [cell for cell in cells(setting) if cell not in done]
    timed = out / "latency.json"
    latency = json.loads(timed.read_text("utf-8")) if timed.exists() else None
    return {**header, "cells": records, "missing": missing, "latency": latency}


if __name__ == "__main__":
    main()
