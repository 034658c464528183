"""Write the README's tables from the measured files: ``python bench/tables.py``. A test holds the two together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def model_cpu(record: dict[str, Any]) -> str:
    """One row a shape and batch: prunevit beside the best peer and beside the dense original."""
    env, rows = record["environment"], [row for row in record["rows"] if row["impl"] == "prunevit"]
    lines = [
        "| pruned model | batch | prunevit | best peer | speed-up over it | share of FMA peak "
        "| speed-up over dense in its best peer | MACs ratio |",
        "|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {row['shape']} | {row['batch']} | {row['ms_p50']:.1f} ms | {row['best_peer']} "
        f"| {row['ratio_to_best_peer']:.2f} × | {row['fraction_of_peak']:.0%} "
        f"| {row['pruned_over_dense']:.2f} × | {row['macs_ratio']:.2f} × |"
        for row in rows
    ]
    peaks = [row["fma_peak_gflops"] for row in rows]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    lines += [
        "",
        f"fp32, {env['threads']} threads of an {env['cpu']}; {versions}; commit {env['commit']}. Peers: eager, "
        "torch.compile with freezing, ONNX Runtime, OpenVINO, on the same pruned model, each in its own process, "
        "interleaved. Ratios are medians over rounds, and the best peer is the one that prunevit is ahead of by least "
        "in them, which need not be the one with the lowest median time. The FMA peak is measured in the same rounds: "
        f"{min(peaks):.0f} to {max(peaks):.0f} GFLOP/s, from row to row. `{env['command']}`.",
    ]
    return "\n".join(lines)


TABLES = {"model-cpu": model_cpu}


def fill(readme: str) -> str:
    """The README with each table between its markers made anew."""
    for name, render in TABLES.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, rest = readme.split(start, 1)
        _, after = rest.split(end, 1)
        results = ROOT / "bench" / "results" / f"{name}.json"
        table = render(json.loads(results.read_text("utf-8")))
        readme = f"{before}{start}{table}\n{end}{after}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(fill(path.read_text("utf-8")), "utf-8")
