"""Options that several commands share."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

Checkpoint = Annotated[Path, typer.Argument(help="A checkpoint directory.", show_default=False)]
Model = Annotated[str, typer.Argument(help="A timm model by name, or a checkpoint directory.", show_default=False)]
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

Device = Annotated[
    str | None,
    typer.Option(help="Where the model runs while this works on it; a GPU where there is one.", show_default=False),
]
Pairs = dict[str, Any]


def words(text: str | None) -> list[str] | None:
    """A comma-separated list."""
    return None if text is None else [word.strip() for word in text.split(",") if word.strip()]


def pairs(texts: Sequence[str] | None, option: str, owners: Mapping[str, str] | None = None) -> Pairs:
    """NAME=VALUE, several times; values are JSON or Python's literals where they can be read so, else text.

    A name that another option sets is refused: ``owners`` say which.
    """
    made: Pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise typer.BadParameter(f"expected NAME=VALUE, got {text!r}", param_hint=option)
        if (owner := (owners or {}).get(name.strip())) is not None:
            raise typer.BadParameter(f"expected {name.strip()} by {owner}", param_hint=option)
        made[name.strip()] = _value(value.strip())
    return made


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):  # true and True, 0.9 and .9
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
