"""``prunevit demo``: the whole way on real images, in a few minutes, without a GPU or a network."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .._atomic import expect_replaceable
from .._units import si
from ._options import Seed
from ._output import Json, percent, reporting, table

Out = Annotated[Path, typer.Option(help="The folder to write.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images for the dense model.")]
RecoveryEpochs = Annotated[int, typer.Option(min=1, help="Passes for the pruned one.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each model is timed.")]


def command(
    out: Out = Path("demo-out"),
    seed: Seed = 0,
    epochs: Epochs = 60,
    recovery_epochs: RecoveryEpochs = 30,
    rounds: Rounds = 30,
    as_json: Json = False,
) -> None:
    """Train a small ViT on handwritten digits, prune, recover, save and run it; then time a published pruned DeiT."""
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"expected a folder, or nothing yet, got {out}, a file", param_hint="--out")
    with reporting(as_json) as output:
        expect_replaceable(out / "checkpoint")
        start = time.monotonic()
        import torch

        from ..machine import machine
        from ..plots import plot_shape
        from ._digits_demo import Steps, run_digits
        from ._latency_demo import run_latency

        out.mkdir(parents=True, exist_ok=True)
        digits, dense, pruned = run_digits(output, out, seed, Steps(epochs, recovery_epochs))
        deit = run_latency(output, rounds, seed)
        plot_shape(pruned, out / "shape.png", name=f"digits ViT, pruned by {digits['pruned']['method']}", dense=dense)
        seconds = time.monotonic() - start
        here = {**machine(), "threads": torch.get_num_threads(), "demo_seconds": seconds}
        report = {"digits": digits, "deit_small": deit, "environment": here}
        (out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", "utf-8")
        output.done(report, _table(report))
        output.say(
            f"wrote {out}/checkpoint, {out}/images, {out}/shape.png and {out}/report.json in {seconds:.0f} s; "
            f"now try: prunevit run {out}/checkpoint {out}/images/3.png"
        )


def _table(report: dict[str, Any]) -> Any:
    dense, pruned, runtime = (report["digits"][name] for name in ("dense", "pruned", "runtime"))
    deit = report["deit_small"]
    made = table(("", "dense", "pruned", "pruned, in prunevit"), ())
    kept = [f" ({percent(pruned[name] / dense[name], 0)})" for name in ("macs", "params")]
    made.add_row("[bold]handwritten digits")
    made.add_row("test accuracy", *(percent(part["accuracy"]) for part in (dense, pruned, runtime)))
    made.add_row("MACs", si(dense["macs"]), si(pruned["macs"]) + kept[0], "")
    made.add_row("parameters", si(dense["params"]), si(pruned["params"]) + kept[1], "")
    error = runtime["max_error_vs_masked_dense"]
    made.add_row("largest difference to the masked dense model", "", "", f"{error:.1e}", end_section=True)
    made.add_row("[bold]DeiT-S, 224 px, one image, CPU")
    made.add_row("MACs", "100 %", percent(deit["macs_ratio"], 0), percent(deit["macs_ratio"], 0))
    times = [deit[f"{name}_ms"] for name in ("dense_eager", "pruned_eager", "pruned_runtime")]
    made.add_row("time", *(f"{ms:.1f} ms" for ms in times))
    made.add_row("speed", *(f"{times[0] / ms:.2f} ×" for ms in times))
    return made
