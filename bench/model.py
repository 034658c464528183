"""Whole models: the pruned shape in prunevit against every peer, and against its dense original in every peer.

    python bench/model.py --device cpu --shapes snp_deit_small --batch 1,8 --threads 2 --out bench/results
    python bench/model.py --device cuda --shapes snp_deit_small --batch 1,64,256
    python bench/model.py --roofline --shapes snp_deit_tiny --batch 8

Rows: shape, batch, threads, impl, ms_p50, ms_p20, ms_p80, img_per_s, gflops, fraction_of_peak, ratio_to_best_peer,
prunevit_over_it; and for each shape ``pruned_over_dense`` beside the MACs ratio. Ratios are medians over rounds, the
best peer is the one that prunevit is ahead of by least. ``gflops`` counts the multiply-accumulates that an
implementation runs: prunevit leaves out the last block's rows that no one reads, the peers do not. ``_gpu.py`` has
what is compared on a GPU; ``--roofline`` shows where the time goes, step by step, on either.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import _gpu
import torch
import typer
from _record import environment
from _record import write as write_record
from _show import table
from rich.console import Console
from rich.table import Table

from prunevit import PrunedViT, Runtime, shapes
from prunevit.benchmark import MODEL_PEERS, PeerFailed, compare, missing
from prunevit.runtime.explain import Explanation

console = Console(stderr=True)

# the goals on two AVX-512 cores: times the best peer at batch 1 and at batch 8, share of the FMA peak at batch 8
GOALS = {
    "snp_deit_tiny": (2.0, 1.3, 0.65),
    "snp_deit_small_1g3": (2.0, 1.5, 0.70),
    "snp_deit_small": (2.0, 1.5, 0.73),
    "ragged_deit_small": (1.5, 1.3, 0.75),
    "savit_deit_base": (1.6, 1.2, 0.78),
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
    columns = ("shape", "batch", "ms", "best peer", "× best peer", "goal", "of peak", "goal", "× dense", "MACs ratio")
    cells = []
    for row in (row for row in rows if row["impl"] == "prunevit"):
        b1, b8, share = GOALS.get(row["shape"], (None, None, None))
        goal = {1: b1, 8: b8}.get(row["batch"])
        cells.append(
            (
                row["shape"],
                str(row["batch"]),
                f"{row['ms_p50']:.1f}",
                row["best_peer"],
                f"{row['ratio_to_best_peer']:.2f}",
                f"{goal:.1f}" if goal else "–",
                f"{row['fraction_of_peak']:.0%}",
                f"{share:.0%}" if share and row["batch"] == 8 else "–",
                f"{row['pruned_over_dense']:.2f}",
                f"{row['macs_ratio']:.2f}",
            )
        )
    return table("prunevit against the best peer on the same pruned model, interleaved", columns, cells)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """The speed of every implementation beside the best peer's in the same round, a panel a batch size."""
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
            axis.bar(places, [r["ratio_to_best_peer"] for r in chosen], width=0.15, color=colour, label=impl)
        axis.axhline(1, color="#444444", linewidth=0.6)
        axis.set_xticks(range(len(names)), names, fontsize=8)
        axis.set_ylabel("speed, best peer = 1")
        axis.set_title(f"batch {batch}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8, ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def roofline(shape: str, batch: int, device: str, threads: int, rounds: int, tuning: Path | None = None) -> Explanation:
    """Every step of a shape beside the least time that it could take."""
    torch.manual_seed(0)
    runtime = Runtime(PrunedViT(shapes.get(shape)), device=device, threads=threads, tuning=tuning).warmup(batch)
    return runtime.explain(batch, rounds)


def roofline_table(shape: str, it: Explanation) -> Table:
    peaks = [f"{it.peaks.flops / 1e9:.0f} GFLOP/s", f"{it.peaks.memory / 1e9:.0f} GB/s"]
    peaks += [f"{it.peaks.exps / 1e9:.0f} G exponentials/s"] if it.peaks.exps is not None else []

    def line(name: str, ms: float, floor_ms: float, bound: str = "", kernel: str = "") -> tuple[str, ...]:
        return name, f"{1e3 * ms:.1f}", f"{1e3 * floor_ms:.1f}", f"{floor_ms / ms:.0%}", bound, kernel

    rows = [line(step.name, step.ms, step.floor_ms, step.bound, step.kernel) for step in it.steps]
    rows.append(line("a whole call", it.call_ms, sum(step.floor_ms for step in it.steps)))
    title = f"{shape}, batch {it.batch}, {it.dtype} on {it.device}; {', '.join(peaks)} at most"
    return table(title, ("step", "µs", "floor µs", "of floor", "bound by", "kernel"), rows)


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    shapes_: Annotated[str, typer.Option("--shapes", help="names, comma-separated")] = ",".join(GOALS),
    batch: Annotated[str, typer.Option(help="batch sizes, comma-separated; 1,8 and on a GPU 1,64,256")] = "",
    threads: int = 2,
    rounds: int = 9,
    seconds: Annotated[float, typer.Option(help="of one peer's turn in one round")] = 0.4,
    impls: Annotated[str, typer.Option(help="on a GPU, implementations, comma-separated; all by default")] = "",
    out: Annotated[Path | None, typer.Option(help="folder for the .json, .csv and .png files")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="write the rows to this file")] = None,
    limit: Annotated[float, typer.Option(help="seconds after which a GPU begins no further shape")] = 300,
    tuning: Annotated[Path | None, typer.Option(help="on a GPU, the tuning.json that prunevit runs with")] = None,
    roofline_: Annotated[bool, typer.Option("--roofline", help="only the time of each step beside its floor")] = False,
) -> None:
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu or cuda, got {device}")
    names, batches = shapes_.split(","), [int(size) for size in (batch or _batches(device)).split(",")]
    if device == "cuda":
        _gpu.expect_gpu()
    if roofline_:
        for shape, size in product(names, batches):
            found = roofline(shape, size, device, threads, rounds, tuning)
            Console(width=150).print(roofline_table(shape, found))
            if out is not None:
                where = _gpu.slug(torch.cuda.get_device_name()) if device == "cuda" else "cpu"
                out.mkdir(parents=True, exist_ok=True)
                (out / f"roofline-{shape}-batch{size}-{where}.json").write_text(found.to_json() + "\n", "utf-8")
        return
    if device == "cuda":
        chosen = impls.split(",") if impls else None
        _gpu.bench("model", names, batches, out, limit=limit, impls=chosen, tuning=tuning)
        return
    for name in MODEL_PEERS:
        if (reason := missing(name)) is not None:
            console.print(f"[yellow]{name} is left out:[/] {reason}")
    rows: list[dict[str, Any]] = []
    for shape, size in product(names, batches):
        try:
            rows += measure(shape, size, threads, rounds, seconds)
        except PeerFailed as error:
            console.print(f"[red]{shape}, batch {size}:[/] {error}")
            raise typer.Exit(1) from error
        # what is measured is kept
        write({"environment": environment("float32", threads=threads), "rows": rows}, out, json_)
    Console().print(table_of(rows))


def _batches(device: str) -> str:
    return "1,8" if device == "cpu" else "1,64,256"


def write(record: dict[str, Any], out: Path | None, json_: Path | None) -> None:
    """The rows as JSON, CSV and a picture."""
    rows = record["rows"]
    if json_ is not None:
        json_.write_text(json.dumps(record, indent=1) + "\n")
    if out is None:
        return
    write_record(record, out / "model-cpu.json")
    plot(rows, out / "model-cpu.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
