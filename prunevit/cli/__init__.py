"""The command line: ``prunevit COMMAND``, or ``python -m prunevit COMMAND``.

One module per command, each with one function ``command`` that imports what it needs when it is called: ``--help``
loads no torch. A new command is a module and a line here. Exit codes: 0, 1 for an error with a name, 2 for wrong usage.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from . import bench, demo, evaluate, explain, export, finetune, info, prune, run


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"prunevit {version('prunevit')}")
        raise typer.Exit


app = typer.Typer(
    name="prunevit",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Print the version and leave.")
    ] = False,
) -> None:
    """Prune a Vision Transformer into a ragged shape, and run exactly that shape."""


for _name, _module in {
    "prune": prune,
    "finetune": finetune,
    "info": info,
    "run": run,
    "eval": evaluate,
    "explain": explain,
    "bench": bench,
    "export": export,
    "demo": demo,
}.items():
    app.command(_name, no_args_is_help=_name != "demo")(_module.command)

__all__ = ["app"]
