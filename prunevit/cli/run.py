"""``prunevit run``: name what is on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, expect
from ._models import expect_there
from ._options import Backend, BatchSize, Checkpoint
from ._output import Json, percent, reporting, table

Images = Annotated[list[Path], typer.Argument(help="Image files.", show_default=False)]
TopK = Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")]


def command(
    checkpoint: Checkpoint,
    images: Images,
    top_k: TopK = 5,
    batch_size: BatchSize = 32,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Classify images with a checkpoint in the runtime; prints the most likely classes of each."""
    with reporting(as_json) as output:
        expect_there(checkpoint)
        for path in images:
            expect(path.is_file(), InputError, f"an image file {path}", got="a folder" if path.is_dir() else "none")
        from ._models import open_runtime

        runtime = open_runtime(checkpoint, backend)
        predictions = runtime.predict(images, top_k, batch_size)
        result = {
            "model": str(checkpoint),
            "backend": runtime.backend,
            "device": str(runtime.device),
            "images": [
                {
                    "path": str(path),
                    "top": [{"index": p.index, "label": p.label, "probability": p.probability} for p in top],
                }
                for path, top in zip(images, predictions)
            ],
        }
        text = table(("image", "class", "probability"), ())
        for path, top in zip(images, predictions):
            for place, p in enumerate(top):
                text.add_row(str(path) if place == 0 else "", p.label, percent(p.probability), end_section=p is top[-1])
        output.done(result, text)
