"""Tables for terminals: headings may wrap, cells may not, so that eighty columns are enough."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

FLUSH_LEFT = ("shape", "block", "best peer", "step", "bound by", "kernel", "chosen")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(title=title, box=SIMPLE_HEAD, padding=0, title_justify="left", title_style="bold")
    for place, column in enumerate(columns):
        widest = max(map(len, [*column.split(), *(row[place] for row in rows)]))
        made.add_column(column, justify="left" if column in FLUSH_LEFT else "right", width=widest)
    for row in rows:
        made.add_row(*row)
    return made
