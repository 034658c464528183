"""``prunevit bench``: a checkpoint against everything else that runs it on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._models import expect_there
from ._options import Checkpoint, words
from ._output import Json, count, percent, reporting, table

if TYPE_CHECKING:
    from rich.status import Status

    from ..benchmark import Comparison

DISAGREE = 1.5  # times: rounds further apart were not of one machine

Batch = Annotated[str, typer.Option(help="Batch sizes, comma-separated.")]
Threads = Annotated[int | None, typer.Option(min=1, help="For everyone; all cores by default.", show_default=False)]
Rounds = Annotated[int, typer.Option(min=1, help="Turns that everyone has; ratios are medians over them.")]
Seconds = Annotated[float, typer.Option(min=0.01, help="Of one turn.")]
Peers = Annotated[str | None, typer.Option(help="Some of the peers, comma-separated; all installed by default.")]
Dense = Annotated[bool, typer.Option("--dense/--no-dense", help="Whether to time what it was pruned from as well.")]


def command(
    checkpoint: Checkpoint,
    batch: Batch = "1",
    threads: Threads = None,
    rounds: Rounds = 9,
    seconds: Seconds = 0.4,
    peers: Peers = None,
    dense: Dense = True,
    as_json: Json = False,
) -> None:
    """Time prunevit, eager PyTorch, torch.compile, ONNX Runtime and OpenVINO in turn, in fp32 on this machine's CPU."""
    sizes = words(batch) or []
    if not sizes or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise typer.BadParameter(f"expected batch sizes such as 1,8, got {batch!r}", param_hint="--batch")
    with reporting(as_json) as output:
        expect_there(checkpoint)
        from ..benchmark import MODEL_PEERS, compare, missing
        from ..machine import machine

        original = _dense_job(checkpoint) if dense else None
        if peers is None:
            for reason in (missing(name) for name in MODEL_PEERS):
                if reason is not None:
                    output.say(f"left out: {reason}")
        rows: list[dict[str, Any]] = []
        for size in map(int, sizes):
            with output.console.status(f"batch {size}") as status:
                comparison = compare(
                    {"checkpoint": str(checkpoint)},
                    original,
                    batch=size,
                    threads=threads,
                    rounds=rounds,
                    seconds=seconds,
                    peers=words(peers),
                    progress=partial(_show, status, size),
                )
            rows += comparison.rows()
            if not as_json:
                output.say(_table(checkpoint, comparison))
        output.done({"model": str(checkpoint), "rows": rows, "machine": machine()})


def _show(status: Status, size: int, text: str) -> None:
    status.update(f"batch {size}: {text}")


def _dense_job(checkpoint: Path) -> dict[str, Any] | None:
    """What the checkpoint was pruned from, where its plan says so; its weights do not matter for time."""
    from .. import checkpoint as checkpoints

    plan = checkpoints.load(checkpoint).plan or {}
    return {"spec": plan["dense"]} if isinstance(plan.get("dense"), dict) else None


def _table(checkpoint: Path, comparison: Comparison) -> Any:
    rows = comparison.rows()
    title = f"{checkpoint.resolve().name}, batch {comparison.batch}, {count(comparison.threads, 'thread')}, fp32"
    made = table(("", "ms", "images/s", "of peak", "prunevit is"), (), title=title)
    ours = rows[0]
    for row in rows:
        name = f"{row['impl']}, dense original" if row["dense"] else row["impl"]
        share = "–" if row["fraction_of_peak"] is None else percent(row["fraction_of_peak"], 0)
        faster = "" if row is ours else f"{row['prunevit_over_it']:.2f} × as fast"
        made.add_row(
            name, f"{row['ms_p50']:.2f}", f"{row['img_per_s']:.0f}", share, faster, style="bold" * (row is ours)
        )
    low, high = ours["ratio_lowest"], ours["ratio_highest"]
    among = f"the median over rounds ({low:.2f} to {high:.2f})"
    lines = [f"over the best peer, {ours['best_peer']}: {ours['ratio_to_best_peer']:.2f} ×, {among}"]
    if high > DISAGREE * low:
        lines.append("the rounds disagree: the machine was busy. Measure again when idle, or with more --rounds")
    if "pruned_over_dense" in ours:
        lines.append(
            f"over the dense original in {ours['best_dense_peer']}: {ours['pruned_over_dense']:.2f} ×, "
            f"for {ours['macs_ratio']:.2f} × fewer MACs"
        )
    made.caption, made.caption_justify = "\n".join(lines), "left"
    return made
