"""``prunevit explain``: where the time of a checkpoint goes, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._models import expect_there
from ._options import Backend, Checkpoint
from ._output import Json, expect_writable, reporting

Batch = Annotated[int, typer.Option(min=1, help="Images in a call.")]
Rounds = Annotated[int, typer.Option(min=1, help="How often each step is timed; medians are shown.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of the cpu backend; all cores by default.")]
Html = Annotated[Path | None, typer.Option(help="Write a page with pictures into this file.")]


def command(
    checkpoint: Checkpoint,
    batch: Batch = 1,
    rounds: Rounds = 20,
    backend: Backend = "auto",
    threads: Threads = None,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Time every step, beside its work, the machine's measured peak, what is padding, and which kernel ran."""
    expect_writable(html, "--html")
    with reporting(as_json) as output:
        expect_there(checkpoint)
        from ..runtime import Runtime

        explained = Runtime(checkpoint, backend=backend, threads=threads).explain(batch, rounds)
        result = {**explained.to_dict(), "model": str(checkpoint)}
        if html is not None:
            result["html"] = str(explained.save_html(html))
        output.done(result, explained.table())
        if html is not None:
            output.say(f"wrote {html}")
