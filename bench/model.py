"""Whole models: the pruned shape in prunevit against every peer, and against its dense original in every peer.

    python bench/model.py --device cpu --shapes snp_deit_small --batch 1,8 --threads 2 --out bench/results

Rows: shape, batch, threads, impl, ms_p50, ms_p20, ms_p80, img_per_s, gflops, fraction_of_peak, ratio_to_best_peer; and
for each shape ``pruned_over_dense`` beside the MACs ratio. ``gflops`` counts the multiply-accumulates that an
implementation runs: prunevit leaves out the last block's rows that no one reads, the peers do not.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from prunevit import shapes
from prunevit._machine import machine
from prunevit.benchmark import MODEL_PEERS, PeerFailed, compare, missing

console = Console(stderr=True)

# the goals on two AVX-512 cores: times the best peer at batch 1 and at batch 8, share of the FMA peak at batch 8
GOALS = {
    "snp_deit_tiny": (2.0, 1.3, 0.65),
    "snp_deit_small_1g3": (2.0, 1.5, 0.70),
    "snp_deit_small": (2.0, 1.5, 0.73),
    "ragged_deit_small": (1.5, 1.3, 0.75),
    "savit_deit_base": (1.6, 1.2, 0.78),
}


def environment(threads: int) -> dict[str, Any]:
    """What a number must travel with."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    here = machine()
    return {
        **here,
        "versions": {name: found or "not installed" for name, found in here["versions"].items()},
        "threads": threads,
        "dtype": "float32",
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
    }


def measure(shape: str, batch: int, threads: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One table: prunevit and every peer on the pruned shape, every peer on its dense original, and the FMA peak."""
    dense = shapes.dense_of(shape)
    with console.status("") as status:
        label = f"{shape}, batch {batch}: "
        comparison = compare(
            {"shape": shape},
            {"shape": dense},
            batch=batch,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            progress=lambda text: status.update(label + text),
        )
    return [{"shape": dense if row.pop("dense") else shape, "pruned_shape": shape, **row} for row in comparison.rows()]


def table_of(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="prunevit against the best peer on the same pruned model, interleaved")
    for column in (
        "shape",
        "batch",
        "ms",
        "best peer",
        "× best peer",
        "goal",
        "share of peak",
        "goal",
        "× dense",
        "MACs ratio",
    ):
        table.add_column(column, justify="left" if column in ("shape", "best peer") else "right")
    for row in (row for row in rows if row["impl"] == "prunevit"):
        b1, b8, share = GOALS.get(row["shape"], (None, None, None))
        goal = {1: b1, 8: b8}.get(row["batch"])
        table.add_row(
            row["shape"],
            str(row["batch"]),
            f"{row['ms_p50']:.2f}",
            row["best_peer"],
            f"{row['ratio_to_best_peer']:.2f}",
            f"{goal:.1f}" if goal else "–",
            f"{row['fraction_of_peak']:.0%}",
            f"{share:.0%}" if share and row["batch"] == 8 else "–",
            f"{row['pruned_over_dense']:.2f}",
            f"{row['macs_ratio']:.2f}",
        )
    return table


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Images a second of every implementation, a panel a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys(row["pruned_shape"] for row in rows))
    impls = ["prunevit", *MODEL_PEERS]
    colours = ["#d1495b", "#8d99ae", "#edae49", "#66a182", "#2e4057"]
    figure, axes = plt.subplots(len(batches), 1, figsize=(9, 3.1 * len(batches)), squeeze=False)
    for axis, batch in zip(axes[:, 0], batches):
        for i, (impl, colour) in enumerate(zip(impls, colours)):
            chosen = [r for r in rows if r["batch"] == batch and r["impl"] == impl and r["shape"] == r["pruned_shape"]]
            places = [names.index(r["shape"]) + (i - 2) * 0.16 for r in chosen]
            axis.bar(places, [r["img_per_s"] for r in chosen], width=0.15, color=colour, label=impl)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel("images / s")
        axis.set_title(f"batch {batch}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(
    device: str = "cpu",
    shapes_: Annotated[str, typer.Option("--shapes", help="names, comma-separated")] = ",".join(GOALS),
    batch: Annotated[str, typer.Option(help="batch sizes, comma-separated")] = "1,8",
    threads: int = 2,
    rounds: int = 9,
    seconds: Annotated[float, typer.Option(help="of one peer's turn in one round")] = 0.4,
    out: Annotated[Path | None, typer.Option(help="folder for model-cpu.json, .csv and .png")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
) -> None:
    if device != "cpu":
        console.print(f"expected --device cpu, got {device!r}: the GPU's peers are not written yet")
        raise typer.Exit(2)
    for name in MODEL_PEERS:
        if (reason := missing(name)) is not None:
            console.print(f"[yellow]{name} is left out:[/] {reason}")
    rows: list[dict[str, Any]] = []
    for shape in shapes_.split(","):
        for size in map(int, batch.split(",")):
            try:
                rows += measure(shape, size, threads, rounds, seconds)
            except PeerFailed as error:
                console.print(f"[red]{shape}, batch {size}:[/] {error}")
                raise typer.Exit(1) from error
            write({"environment": environment(threads), "rows": rows}, out, json_)  # what is measured is kept
    Console().print(table_of(rows))


def write(record: dict[str, Any], out: Path | None, json_: Path | None) -> None:
    """The rows as JSON, CSV and a picture."""
    rows = record["rows"]
    if json_ is not None:
        json_.write_text(json.dumps(record, indent=1) + "\n")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / "model-cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    with (out / "model-cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "model-cpu.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
