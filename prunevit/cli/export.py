"""``prunevit export``: a checkpoint as a file that other runtimes read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .._units import si
from ._models import expect_there
from ._options import Checkpoint
from ._output import Json, reporting

Format = Annotated[Literal["onnx"], typer.Option("--format", help="What to write.")]
Out = Annotated[Path, typer.Option(help="The file to write.", show_default=False)]
Opset = Annotated[int | None, typer.Option(help="ONNX's operator set; 20 by default.", show_default=False)]
Batch = Annotated[int | None, typer.Option(min=1, help="Fix the batch size; free by default.", show_default=False)]
Check = Annotated[bool, typer.Option("--check/--no-check", help="Compare the file with the runtime before it is kept.")]


def command(
    checkpoint: Checkpoint,
    out: Out,
    format_: Format = "onnx",
    opset: Opset = None,
    batch: Batch = None,
    check: Check = True,
    as_json: Json = False,
) -> None:
    """Write one self-contained ONNX file, which ONNX Runtime, OpenVINO and others run."""
    with reporting(as_json) as output:
        expect_there(checkpoint)
        from ..interop.onnx import OPSET, export_onnx

        used = OPSET if opset is None else opset
        path = export_onnx(checkpoint, out, opset=used, batch=batch, check=check)
        size = path.stat().st_size
        result = {"model": str(checkpoint), "out": str(path), "format": format_, "opset": used, "bytes": size}
        output.done(result, f"wrote {path}, {si(size, 'B')}")
