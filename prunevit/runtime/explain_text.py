"""An explanation as a table in a terminal."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .explain import Explanation, StepReport

COLUMNS = ("step", "rows × in → out", "MMAC", "MB", "ms", "GFLOP/s", "of peak", "padding", "kernel")
LEAVE_FIRST = ("kernel", "MB", "padding", "rows × in → out", "GFLOP/s")
CALM = 0.85  # below this share of the best probe, times say more of the machine's load than of the model


class StepTable:
    """A row a step, a section a block, and the whole call; in a narrow terminal fewer columns, never half a number."""

    def __init__(self, it: Explanation) -> None:
        self.it = it

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = list(COLUMNS)
        roomy = options.update(max_width=1000)
        for gone in (None, *LEAVE_FIRST):
            if gone is not None:
                columns.remove(gone)
            made = _table(self.it, columns)
            if Measurement.get(console, roomy, made).maximum <= options.max_width:
                break
        yield Text(headline(self.it), style="bold")
        yield made
        yield Text(caption(self.it), style="dim")
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            yield Text(f"no room for {', '.join(missing)}: see a wider terminal, --html or --json", style="dim")


def _table(it: Explanation, columns: Sequence[str]) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    places = [COLUMNS.index(name) for name in columns]
    for name, place in zip(columns, places):
        made.add_column(name, justify="left" if place in (0, 1, 8) else "right", no_wrap=True)

    def add(row: Sequence[str], **how: Any) -> None:
        made.add_row(*(row[place] for place in places), **how)

    for step, after in zip(it.steps, (*it.steps[1:], None)):
        add(cells(step), end_section=after is None or after.block != step.block)
    whole = f"{it.macs / 1e6:.1f}", "", f"{it.call_ms:.3f}", f"{it.gflops:.0f}", f"{it.peak_share:.0%}"
    add(["a whole call", "", *whole, _padding(it.waste), ""], style="bold")
    return made


def headline(it: Explanation) -> str:
    where = f"{it.threads} threads" if it.device == "cpu" else it.device
    return f"{it.model}: {it.call_ms:.2f} ms for a batch of {it.batch}, backend {it.backend}, {it.dtype}, {where}"


def caption(it: Explanation) -> str:
    """What was executed of what, where the time went, and against which peak."""
    lines = []
    if it.dense_macs is not None:
        share = it.macs / it.dense_macs
        lines.append(
            f"{it.macs / 1e9:.3f} GMAC executed of the dense model's {it.dense_macs / 1e9:.3f} ({share:.0%}); "
            f"the pruned model has {it.spec.macs(it.batch) / 1e9:.3f}"
        )
    top = ", ".join(f"{op} {ms / it.steps_ms:.0%}" for op, ms, _ in it.by_op()[:4])
    lines.append(f"time: {top}")
    whys = dict.fromkeys(f"{step.kernel}: {step.why}" for step in it.steps)
    lines.append("; ".join(whys))
    lines.append(f"peak: {it.peaks.flops / 1e9:.0f} GFLOP/s, measured here ({it.peaks.probe})")
    if it.peaks.calm < CALM:
        lines.append(busy(it))
    lines.append(f"medians of {it.rounds} rounds; MACs are useful ones, softmax, norms and activations are not counted")
    return "\n".join(lines)


def busy(it: Explanation) -> str:
    """What to think of numbers from a machine that was doing something else too."""
    return (
        f"the machine was busy: its peak was {it.peaks.calm:.0%} of the best most of the time. Measure again when idle"
    )


def cells(step: StepReport) -> list[str]:
    """A step's numbers, column by column."""
    return [
        step.name,
        step.work,
        f"{step.macs / 1e6:.1f}",
        f"{step.bytes / 1e6:.2f}",
        f"{step.ms:.3f}",
        f"{step.gflops:.0f}",
        f"{step.peak_share:.0%}",
        _padding(step.waste),
        step.kernel,
    ]


def _padding(waste: float | None) -> str:
    return "–" if waste is None else f"{waste:.1%}"


def text(it: Explanation) -> str:
    """The table without colours, wide enough for its longest row."""
    stream = io.StringIO()
    Console(file=stream, width=160, color_system=None, highlight=False).print(StepTable(it))
    return stream.getvalue()
