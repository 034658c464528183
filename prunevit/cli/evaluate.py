"""``prunevit eval``: accuracy on a folder of images, through the runtime."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from .._units import si
from ..errors import InputError, expect
from ._models import expect_there
from ._options import Backend, BatchSize, Checkpoint, Data, Workers
from ._output import Json, percent, reporting, table

SplitOption = Annotated[
    Literal["test", "validation", "calibration", "train"], typer.Option(help="Which split of the data to take.")
]


def command(
    checkpoint: Checkpoint,
    data: Data,
    split: SplitOption = "test",
    backend: Backend = "auto",
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy in the runtime."""
    with reporting(as_json) as output:
        expect_there(checkpoint, data)
        from ._measure import accuracy
        from ._models import data_for, open_model, open_runtime

        model: Any = open_model(str(checkpoint))
        expect(model.num_classes > 0, InputError, "a checkpoint with classes", got="one without a classifier")
        images, config = data_for(model, data)
        loader = images.loader(split, config, batch_size=batch_size, workers=workers)
        runtime = open_runtime(model, backend)
        with output.bar("evaluating", total=len(loader)) as bar:
            found = accuracy(runtime, bar.over(loader), runtime.device)
        result = {
            "model": str(checkpoint),
            "data": data,
            "split": split,
            "images": found.images,
            "accuracy": found.top1,
            "accuracy_top5": found.top5,
            "macs": runtime.spec.macs(),
            "params": runtime.spec.params(),
            "backend": runtime.backend,
            "device": str(runtime.device),
        }
        rows = [
            (
                f"{data}, {split}",
                found.images,
                percent(found.top1, 2),
                "–" if found.top5 is None else percent(found.top5, 2),
                si(runtime.spec.macs()),
                f"{runtime.backend} on {runtime.device}",
            )
        ]
        output.done(result, table(("data", "images", "top-1", "top-5", "MACs", "runtime"), rows, title=str(checkpoint)))
