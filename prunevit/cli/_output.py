"""How a command speaks: text and bars for a person, or one JSON object on stdout for a program."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..errors import PrunevitError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID

    from ..pruning import Step

SECONDS_BETWEEN_LINES = 30  # of a log, where a terminal has a bar

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]


class Output:
    """What a command reports to. ``done`` is called once, last."""

    def __init__(self, as_json: bool, quiet: bool = False) -> None:
        from rich.console import Console

        self.as_json = as_json
        self.console: Console = Console(stderr=as_json, highlight=False, quiet=quiet)
        self.result: dict[str, Any] = {}

    def say(self, text: RenderableType) -> None:
        """A line of progress: on stdout for a person, on stderr beside JSON."""
        self.console.print(text)

    def done(self, result: Mapping[str, Any], text: RenderableType | None = None) -> None:
        """The command's answer: ``result`` as JSON, or ``text``."""
        self.result = dict(result)
        if text is not None and not self.as_json:
            self.console.print(text)

    @contextmanager
    def bar(self, what: str, total: float | None = None) -> Iterator[Bar]:
        """A progress bar that goes when the work is done; now and then a line where no terminal shows it."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            Remaining(),
        )
        with Progress(*columns, console=self.console, transient=True) as progress:
            yield Bar(progress, progress.add_task(what, total=total), self.console)


class Bar:
    """One bar. ``over`` advances it by one a batch, however often the batches are gone through."""

    def __init__(self, progress: Progress, task: TaskID, console: Console) -> None:
        self._progress, self._task, self._console = progress, task, console
        self._told = time.monotonic()

    def advance(self) -> None:
        self._update(advance=1)

    def step(self, step: Step) -> None:
        """A training step, as :func:`prunevit.pruning.recover` reports it."""
        self._update(completed=step.step, total=step.total)

    def show(self, what: str, done: int, total: int | None) -> None:
        """Another part of the work."""
        self._update(description=what, completed=done, total=total)

    def _update(self, **changes: Any) -> None:
        self._progress.update(self._task, **changes)
        if not self._console.is_terminal and time.monotonic() - self._told >= SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            task = self._progress.tasks[0]
            done = f": {task.completed:.0f} of {task.total:.0f}" if task.total else ""
            self._console.print(f"{task.description}{done}")

    def over(self, batches: Any) -> Watched:
        return Watched(batches, self)


class Watched:
    """A loader whose batches advance a bar."""

    def __init__(self, batches: Any, bar: Bar) -> None:
        self._batches, self._bar = batches, bar

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            try:
                yield batch
            finally:  # also after the last one that is looked at
                self._bar.advance()


@contextmanager
def reporting(as_json: bool, quiet: bool = False) -> Iterator[Output]:
    """Run a command's body: errors with a name become one message and exit code 1, the answer is printed at the end.

    ``quiet`` prints errors alone: for all but the first of several processes.
    """
    output = Output(as_json, quiet)
    try:
        # a library that prints must not spoil the JSON
        with redirect_stdout(sys.stderr) if as_json else nullcontext():
            yield output
    except (PrunevitError, OSError) as error:
        _fail(error, as_json)
    if as_json and not quiet:
        print(json.dumps(output.result, allow_nan=False))


def _fail(error: Exception, as_json: bool) -> NoReturn:
    # a loader's worker hands on an error with its traceback as the text: the message is what follows the name
    kind = type(error).__name__
    message = str(error).rsplit(f"{kind}: ", 1)[-1].strip()
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"type": kind, "message": message}}))
    raise typer.Exit(1) from None


def table(columns: Iterable[str], rows: Iterable[Iterable[object]], title: str | None = None) -> Any:
    """A plain table; every column but the first is flushed right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for place, column in enumerate(columns):
        made.add_column(column, justify="left" if place == 0 else "right")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def expect_writable(path: Path | None, option: str) -> None:
    """Refuse a file that could not be written before any work is done."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        what = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise typer.BadParameter(f"expected a file in a folder that is there, got {path}: {what}", param_hint=option)


def expect_picture(path: Path | None, option: str) -> None:
    """Refuse what matplotlib would not draw into, likewise."""
    if path is not None and path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"expected a file that ends in .png, .svg or .pdf, got {path}", param_hint=option)
    expect_writable(path, option)


def count(number: int, thing: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"
