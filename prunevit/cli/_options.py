"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)]
Data = Annotated[str, typer.Option(help="A folder of class folders, or 'digits'.", show_default=False)]
MaybeData = Annotated[
    str | None, typer.Option("--data", help="A folder of class folders, or 'digits'.", show_default=False)
]
Out = Annotated[Path, typer.Option(help="The checkpoint directory to write.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Fixes every random choice.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images; 0 reads in this one.")]
Pretrained = Annotated[
    bool, typer.Option("--pretrained/--no-pretrained", help="Whether a timm model comes with its trained weights.")
]
BackendChoice = Literal["auto", "cuda", "cpu", "torch"]
Backend = Annotated[BackendChoice, typer.Option(help="What executes the model.")]

_SCALE = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def constraint(text: str | None) -> str | float | None:
    """What may remain: "45%" stays a share; "2.0G", "1.3e9" or "900M" is a number."""
    if text is None:
        return None
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share:
        if not 0 < float(share[1]) <= 100:
            raise typer.BadParameter(f"expected a share above 0% and up to 100%, got {text!r}")
        return f"{share[1]}%"
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([KMGT]?)\s*", text, re.IGNORECASE)
    if number is None or float(number[1]) == 0:
        raise typer.BadParameter(f"expected a share such as 45% or a number such as 2.0G, got {text!r}")
    return float(number[1]) * _SCALE[number[2].upper()]


def words(text: str | None) -> list[str] | None:
    """A comma-separated list."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]
