"""An explanation as a table in a terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .explain import Explanation, StepReport

COLUMNS = ("step", "rows × in → out", "MMAC", "MB", "ms", "GFLOP/s", "of peak", "padding", "kernel")
CALM = 0.85  # below this share of the best probe, times say more of the machine's load than of the model


def table(it: Explanation) -> Table:
    """A row a step, a section a block, and the whole call."""
    made = Table(title=headline(it), box=SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    for place, name in enumerate(COLUMNS):
        made.add_column(name, justify="left" if place in (0, 1, 8) else "right", no_wrap=True)
    for step, after in zip(it.steps, (*it.steps[1:], None)):
        ends = after is None or after.block != step.block
        made.add_row(*_cells(step), end_section=ends)
    made.add_row(
        "a whole call",
        "",
        f"{it.macs / 1e6:.1f}",
        "",
        f"{it.call_ms:.3f}",
        f"{it.gflops:.0f}",
        f"{it.peak_share:.0%}",
        _padding(it.waste),
        "",
        style="bold",
    )
    made.caption = caption(it)
    made.caption_justify = "left"
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


def _cells(step: StepReport) -> list[str]:
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
    Console(file=stream, width=160, color_system=None, highlight=False).print(table(it))
    return stream.getvalue()
