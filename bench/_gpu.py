"""Ops and whole models on an NVIDIA GPU, against their peers: interleaved rounds, every one in its own process.

    python bench/fused_mlp.py --device cuda --shapes snp_deit_tiny --batch 1,256 --out bench/results

What has been measured is written after every few works. A peer that is not built in time is left out, so that ours are
measured all the same; when ``--limit`` seconds are nearly over nothing further is begun, and the command that does the
rest is printed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _record import environment
from _record import write as write_record
from _show import table
from _works import OVERLAPPING, Work, blocks_of, cost, floor_ms, goals
from rich.console import Console
from rich.table import Table

from prunevit import shapes
from prunevit.benchmark import Peer, PeerFailed, best_of, run_interleaved, speedup
from prunevit_kernels._configs import MLP_KERNELS
from prunevit_kernels.tuning import Tuning, machine_name

IMPLS: dict[str, tuple[str, ...]] = {
    "ragged_attention": ("prunevit", "sdpa padded", "sdpa padded flash", "sdpa padded cudnn", "sdpa grouped"),
    "norm_linear": ("prunevit", "eager", "inductor max-autotune"),
    "fused_mlp": (
        "prunevit", *(f"prunevit:{kernel}" for kernel in MLP_KERNELS), "eager", "inductor max-autotune",
    ),
    "model": (
        "prunevit", OVERLAPPING, "eager", "eager grouped", "dense eager", "compile reduce-overhead",
        "dense compile reduce-overhead", "compile max-autotune", "dense compile max-autotune",
    ),
}  # fmt: skip
SLOW = ("max-autotune", "reduce-overhead")  # end the names of peers that take long to build
QUICK_SECONDS = 120.0  # in which any other is built, unless a kernel hangs
LEAST = 60.0  # seconds below which nothing is begun
COLUMNS = ("shape", "batch", "best peer", "µs", "its µs", "× best", "goal", "of floor", "goal", "× dense", "MACs ratio")
console = Console(stderr=True)


def works_of(kind: str, name: str, batches: list[int]) -> list[Work]:
    return [{"name": name, "batch": b} for b in batches] if kind == "model" else blocks_of(kind, [name], batches)


def measure(
    kind: str,
    works: list[Work],
    impls: Sequence[str],
    *,
    device: str = "cuda",
    dtype: str = "bfloat16",
    rounds: int = 5,
    seconds: float = 0.05,
    build_seconds: float | None = None,
    tuning: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of all implementations for some works, timed in turn; and why peers failed that have no rows."""
    job = {"kind": kind, "works": works, "device": device, "dtype": dtype, "tuning": tuning and str(tuning)}
    program = (str(Path(__file__).with_name("_gpu_worker.py")),)
    # the quick ones, ours first, start at once, and then the slow ones; a lock lets one build at a time
    names = sorted(["peak", *impls], key=lambda name: name.endswith(SLOW))
    quick = sum(not name.endswith(SLOW) for name in names)
    turns = [{"turn": i % quick, "most": QUICK_SECONDS if i < quick else None} for i in range(len(names))]
    everyone = [Peer(name, job | turn, program) for name, turn in zip(names, turns)]
    probe, peers = everyone[0], everyone[1:]
    failed = run_interleaved(
        everyone, threads=4, rounds=rounds, seconds=seconds * len(works), progress=progress,
        at_once=quick, build_seconds=build_seconds, dispensable=set(impls) - {"prunevit"},
    )  # fmt: skip
    ran = [peer for peer in peers if peer.name not in failed]
    return rows_of(kind, works, ran, probe.facts), {impl: str(failure) for impl, failure in failed.items()}


def rows_of(kind: str, works: list[Work], peers: list[Peer], peaks: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a work and implementation; what stands beside a goal is in ours."""
    rows = []
    for i, work in enumerate(works):
        able = [peer for peer in peers if peer.samples[0][i] is not None]  # not every kernel of ours takes every shape
        one = {peer.name: peer.only(i) for peer in able}
        ours = one["prunevit"]
        (ours_peer,) = (peer for peer in peers if peer.name == "prunevit")
        costs = ours_peer.facts["costs"][i] if kind == "model" else [cost(kind, work)]
        floor = floor_ms(costs, peaks)

        # prunevit: as chosen; prunevit:split and so on: kernels of ours that were asked for, no peers
        same = [peer for name, peer in one.items() if not name.startswith(("prunevit", "dense "))]
        dense = [peer for name, peer in one.items() if name.startswith("dense ")]
        best, best_dense = best_of(same, ours), best_of(dense, ours)
        goal, floor_goal, against = goals(kind, work)
        goal = goal if set(against) <= set(one) else None
        for name, peer in one.items():
            ms = peer.quantile(0.5)
            row: dict[str, Any] = {
                "op": kind,
                "shape": work["name"] + (f".block{work['block']}" if "block" in work else ""),
                "batch": work["batch"],
                "impl": name,
                **({"e": work["e"], "f": work["f"]} if kind == "fused_mlp" else {}),
                "us_p50": 1e3 * ms,
                "us_p20": 1e3 * peer.quantile(0.2),
                "us_p80": 1e3 * peer.quantile(0.8),
                "img_per_s": 1e3 * work["batch"] / ms,
                "tflops": sum(flops for flops, _, _ in costs) / ms / 1e9,
                "floor_us": 1e3 * floor,
                "fraction_of_floor": None if name.startswith("dense ") else floor / ms,
            }
            if name.startswith("prunevit") and kind == "fused_mlp":
                row["kernel"] = next(peer for peer in peers if peer.name == name).facts["kernels"][i]
            if name == OVERLAPPING:
                row["gain"] = speedup(peer, ours)
            if peer is ours and best is not None:
                row |= {"best_peer": best.name, "ratio_to_best_peer": speedup(ours, best), "goal_ratio": goal}
                row |= {"goal_fraction_of_floor": floor_goal}
                kernels = [peer for name, peer in one.items() if name.startswith("prunevit:")]
                if kernels and kind == "fused_mlp":
                    fastest = min(kernels, key=lambda peer: peer.quantile(0.5))
                    row |= {"fastest": fastest.name, "fastest_to_best_peer": speedup(fastest, best)}
            if peer is ours and best_dense is not None:
                ratio = shapes.get(shapes.dense_of(work["name"])).macs() / shapes.get(work["name"]).macs()
                row |= {"best_dense_peer": best_dense.name, "pruned_over_dense": speedup(ours, best_dense)}
                row |= {"macs_ratio": ratio}
            peak_facts = {"peak_tflops": peaks["flops"] / 1e12, "peak_gb_s": peaks["bandwidth"] / 1e9}
            rows.append({key: _rounded(value) for key, value in {**row, **peak_facts}.items()})
    return rows


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table_of(rows: list[dict[str, Any]]) -> Table:
    """A line a shape and batch: how prunevit stands beside its goals."""

    def times(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f} ×"

    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    lines = []
    for row in (row for row in rows if row["impl"] == "prunevit"):
        same = (r for r in rows if (r["shape"], r["batch"]) == (row["shape"], row["batch"]))
        best = next((r["us_p50"] for r in same if r["impl"] == row.get("best_peer")), None)
        lines.append((
            row["shape"], str(row["batch"]), row.get("best_peer", "–"), f"{row['us_p50']:.1f}",
            "–" if best is None else f"{best:.1f}", times(row.get("ratio_to_best_peer")), times(row.get("goal_ratio")),
            share(row["fraction_of_floor"]), share(row.get("goal_fraction_of_floor")),
            times(row.get("pruned_over_dense")), times(row.get("macs_ratio")),
        ))  # fmt: skip
    title = f"{rows[0]['op']}: {rows[0]['peak_tflops']} TFLOP/s, {rows[0]['peak_gb_s']} GB/s measured"
    return table(title, COLUMNS, lines)


def kernels_of(rows: list[dict[str, Any]]) -> Table:
    """A line a shape and batch of fused_mlp: what each kernel of ours takes, and which was chosen."""
    names, lines = [impl for impl in IMPLS["fused_mlp"] if impl.startswith("prunevit:")], []
    for row in (row for row in rows if row["impl"] == "prunevit"):
        same = {r["impl"]: r for r in rows if (r["shape"], r["batch"]) == (row["shape"], row["batch"])}
        times = {name: same[name]["us_p50"] for name in names if name in same}
        best = min(times.values(), default=None)
        cells = ["–" if name not in times else f"{times[name]:.1f}{'*' * (times[name] == best)}" for name in names]
        ratio = "–" if best is None else f"{row['us_p50'] / best:.2f}"
        facts = (row["shape"], str(row["e"]), str(row["f"]), str(row["batch"]))
        lines.append((*facts, *cells, row["kernel"] or "–", ratio))
    kernels = (name.removeprefix("prunevit:") for name in names)
    columns = ("shape", "E", "F", "batch", *kernels, "chosen", "× best")
    return table("fused_mlp, our kernels, µs: the fastest, and what was chosen", columns, lines)


def overlap_of(rows: list[dict[str, Any]]) -> list[str]:
    """What overlapping launches gain, a line a model."""
    return [
        f"{row['shape']}, batch {row['batch']}: {row['gain']:.2f} times as fast with overlapping launches"
        for row in rows
        if row["impl"] == OVERLAPPING
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times faster than the best peer, beside the goal; a bar a shape and batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = [row for row in rows if row["impl"] == "prunevit" and "ratio_to_best_peer" in row]
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.22 * len(ours)))
    places = range(len(ours))
    axis.barh(places, [row["ratio_to_best_peer"] for row in ours], color="#d1495b", height=0.7)
    for place, row in enumerate(ours):
        if row["goal_ratio"] is not None:
            axis.plot([row["goal_ratio"]] * 2, [place - 0.45, place + 0.45], color="#2e4057")
    axis.set_yticks(places, [f"{row['shape']}, batch {row['batch']}" for row in ours], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("times faster than the best peer (line: goal)")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def slug(gpu: object) -> str:
    """A GPU's name, or none, as file names have it."""
    return re.sub(r"[^a-z0-9]+", "-", str(gpu or "no-gpu").lower()).strip("-")


def write(kind: str, record: dict[str, Any], out: Path) -> None:
    """JSON, CSV and a picture, named by the GPU; rows that the JSON file has from earlier runs stay."""
    file = out / f"{kind}-{slug(record['environment']['gpu'])}.json"
    new = {(row["shape"], row["batch"]) for row in record["rows"]}
    before = json.loads(file.read_text("utf-8")) if file.exists() else {"rows": []}
    rows = [row for row in before["rows"] if (row["shape"], row["batch"]) not in new] + record["rows"]
    again = {shape.partition(".")[0] for shape, _ in new}
    failed = {name: why for name, why in before.get("failed", {}).items() if name not in again}
    failed |= record.get("failed", {})
    write_record({**record, "failed": failed, "rows": rows}, file)
    plot(rows, file.with_suffix(".png"))


def bench(
    kind: str, names: list[str], batches: list[int], out: Path | None, *, limit: float, dtype: str = "bfloat16",
    impls: Sequence[str] | None = None, device: str = "cuda", rounds: int = 5, tuning: Path | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure a few works after the other until the limit; print the table, write the files."""
    until, rows, failed = time.monotonic() + limit, list[dict[str, Any]](), dict[str, dict[str, str]]()
    if tuning is not None and device == "cuda":
        expect_measured_here(tuning)
    several = 1 if kind == "model" else 6
    todo = list[tuple[str, list[Work]]]()
    for name in names:
        works = works_of(kind, name, batches)
        todo += [(name, works[first : first + several]) for first in range(0, len(works), several)]
    left = list(todo)
    while left and (len(left) == len(todo) or until - time.monotonic() > LEAST):
        name, works = left.pop(0)
        timing = rounds * 0.1 * len(works) * len(impls or IMPLS[kind])  # twice the seconds that are asked for
        with console.status("") as status:
            label = f"{kind}, {name}, {len(left)} to follow: "
            try:
                measured, left_out = measure(
                    kind, works, impls or IMPLS[kind], device=device, dtype=dtype, rounds=rounds, tuning=tuning,
                    build_seconds=max(LEAST / 2, until - time.monotonic() - timing),
                    progress=lambda text, label=label: status.update(label + text),
                )  # fmt: skip
            except PeerFailed as failure:  # ours, or the probe: nothing to compare, but the next may do
                measured, left_out = [], {"prunevit": str(failure)}
        rows += measured
        for reason in left_out.values():
            console.print(f"[yellow]{name}, left out:[/] {reason}")
        if left_out:
            failed.setdefault(name, {}).update(left_out)
        if out is not None and rows:
            write(kind, {"environment": environment(dtype), "failed": failed, "rows": rows}, out)
    show(kind, rows)
    if left:
        sizes = ",".join(map(str, batches))
        shapes_left = ",".join(dict.fromkeys(name for name, _ in left))
        again = f"python bench/{kind}.py --device {device} --batch {sizes} --shapes {shapes_left}"
        console.print(f"[yellow]{limit:.0f} s are over; the rest:[/] {again}")
    if any("prunevit" in reasons for reasons in failed.values()):
        raise SystemExit("prunevit failed: see above")
    return rows


def show(kind: str, rows: list[dict[str, Any]]) -> None:
    """The tables."""
    if not rows:
        return
    Console(width=150).print(table_of(rows))
    if kind == "fused_mlp":
        Console(width=150).print(kernels_of(rows))
    for line in overlap_of(rows):
        console.print(line)


def expect_measured_here(tuning: Path) -> None:
    """End with a sentence where a tuning.json has nothing for this GPU and these versions."""
    known = Tuning.read(tuning, machine_name())
    if not known:
        raise SystemExit(
            f"expected {tuning} to be tuned on {known.machine}, got {'; '.join(known.others) or 'nothing'}"
        )


def expect_gpu() -> None:
    """End with a sentence where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("expected an NVIDIA GPU that PyTorch sees, got none")
    if torch.cuda.get_device_capability() < (8, 0):
        raise SystemExit(f"expected a GPU of sm_80 or newer, got {torch.cuda.get_device_name()}")
