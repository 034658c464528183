"""The pictures of an explanation's page, as SVG.

Lengths along x are percentages and text is in pixels, so that a picture fills a phone or a desktop without scaling its
words. Colours are classes of the page's style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from .._units import si
from ..plots import gone, head_unit, originals_of
from ..spec import ViTSpec

if TYPE_CHECKING:
    from .explain import Explanation

ROW, BAR = 22, 14  # pixels from block to block, and of a bar
CLASSES = {
    "patch_embed": "stem",
    "norm_linear": "qkv",
    "ragged_attention": "attention",
    "linear_residual": "proj",
    "fused_mlp": "mlp",
    "token_scores": "tokens",
    "select_tokens": "tokens",
}


def colour_of(op: str) -> str:
    """The style class of a kind of step; whatever ends the model is one."""
    return CLASSES.get(op, "head")


def _rect(x: float, y: float, width: float, height: float, style: str, title: str = "") -> str:
    note = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<rect class="{style}" x="{x:.3f}%" y="{y:g}" width="{max(width, 0):.3f}%" height="{height:g}">{note}</rect>'
    )


def _text(x: float, y: float, words: str, style: str = "", anchor: str = "start", dx: float = 0) -> str:
    shift = f' dx="{dx:g}"' if dx else ""
    return f'<text class="{style}" x="{x:.3f}%" y="{y:g}" text-anchor="{anchor}"{shift}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.3f}%" y1="{y1:.1f}" x2="{x2:.3f}%" y2="{y2:.1f}"/>'


def _svg(height: float, label: str, parts: Iterable[str]) -> str:
    body = "".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="100%" height="{height:g}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{body}</svg>'
    )


def shape_picture(spec: ViTSpec, dense: ViTSpec | None) -> str:
    """A row a block: each head's query-key width above its value width, then the MLP's; grey is what was pruned."""
    originals, unit = originals_of(spec, dense), head_unit(spec, dense)
    both = (*spec.blocks, *originals)
    slots = max([1, *(b.num_heads for b in both)])
    widest = max([1, *(b.mlp_dim for b in both)])
    heads_at, heads_width, mlp_at, mlp_width = 7.0, 58.0, 69.0, 31.0
    slot = heads_width / slots
    parts = [_text(heads_at, 12, "heads", "axis"), _text(mlp_at, 12, "MLP", "axis")]
    for index, (block, original) in enumerate(zip(spec.blocks, originals)):
        y = 20 + index * ROW
        parts.append(_text(5, y + 11, str(index), "axis", "end"))
        ghosts = range(max(original.num_heads, block.num_heads))
        parts += [_rect(heads_at + h * slot, y, slot * 0.88, BAR, "ghost") for h in ghosts]
        for h, (qk, v) in enumerate(zip(block.qk_dims, block.v_dims)):
            scale, note = slot * 0.88 / unit, f"block {index}, head {h}: query-key {qk}, value {v} of {unit}"
            parts.append(_rect(heads_at + h * slot, y, qk * scale, BAR / 2, "qk", note))
            parts.append(_rect(heads_at + h * slot, y + BAR / 2, v * scale, BAR / 2, "v", note))
        if not block.num_heads:
            parts.append(_text(heads_at, y + 11, gone(block.has_attn), "note", dx=3))
        parts.append(_rect(mlp_at, y, original.mlp_dim / widest * mlp_width, BAR, "ghost"))
        parts.append(
            _rect(mlp_at, y, block.mlp_dim / widest * mlp_width, BAR, "mlp", f"block {index}: MLP {block.mlp_dim}")
        )
        roomy = block.mlp_dim / widest > 0.3
        words = str(block.mlp_dim or gone(block.has_mlp))
        at = mlp_at + block.mlp_dim / widest * mlp_width
        parts.append(
            _text(at, y + 11, words, "inside" if roomy else "note", "end" if roomy else "start", -4 if roomy else 4)
        )
    return _svg(22 + spec.depth * ROW, "the width of every head and MLP", parts)


def time_picture(it: Explanation) -> str:
    """A row a block, its steps one after another as long as they took; the stem and the head have rows of their own."""
    rows: dict[str, list[int]] = {}
    for i, step in enumerate(it.steps):
        row = str(step.block) if step.block is not None else "in" if i == 0 else "out"
        rows.setdefault(row, []).append(i)
    longest = max(sum(it.steps[i].ms for i in row) for row in rows.values())
    at, room = 7.0, 80.0
    parts = []
    for place, (name, members) in enumerate(rows.items()):
        y, x = 4 + place * ROW, at
        parts.append(_text(5, y + 11, name, "axis", "end"))
        for i in members:
            step = it.steps[i]
            width = step.ms / longest * room
            note = f"{step.name}: {step.ms:.3f} ms, {step.gflops:.0f} GFLOP/s, {step.peak_share:.0%} of peak"
            parts.append(_rect(x, y, width, BAR, colour_of(step.op), note))
            x += width
        total = sum(it.steps[i].ms for i in members)
        parts.append(_text(x, y + 11, f"{_three_digits(total)} ms", "note", dx=5))
    return _svg(6 + len(rows) * ROW, "time of each step, block by block", parts)


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def roofline_picture(it: Explanation) -> str:
    """Each step's rate over its intensity, both by powers of ten, under what memory, cache and arithmetic allow."""
    points = [(2 * step.macs / step.bytes, 1e9 * step.gflops, step) for step in it.steps if step.macs]
    peak, memory, cache = it.peaks.flops, it.peaks.memory, it.peaks.cache
    left = math.log10(min([1.0, *(x for x, _, _ in points)])) - 0.2
    right = math.log10(max([peak / memory, *(x for x, _, _ in points)])) + 0.4
    bottom = math.log10(min([peak / 30, *(y for _, y, _ in points)])) - 0.2
    top = math.log10(max([peak, *(y for _, y, _ in points)])) + 0.12
    x0, x1, y0, y1 = 11.0, 98.0, 12.0, 268.0

    def x_of(value: float) -> float:
        return x0 + (math.log10(value) - left) / (right - left) * (x1 - x0)

    def y_of(value: float) -> float:
        return y1 - (math.log10(value) - bottom) / (top - bottom) * (y1 - y0)

    parts, labels = [], []  # what is written stands in front of the dots
    for power in range(math.ceil(left), math.floor(right) + 1):
        parts.append(_line(x_of(10.0**power), y0, x_of(10.0**power), y1, "grid"))
        parts.append(_text(x_of(10.0**power), y1 + 16, f"{10.0**power:g}", "axis", "middle"))
    for power in range(math.ceil(bottom), math.floor(top) + 1):
        parts.append(_line(x0, y_of(10.0**power), x1, y_of(10.0**power), "grid"))
        parts.append(_text(x0, y_of(10.0**power) + 4, si(10.0**power), "axis", "end", -4))
    parts.append(_text((x0 + x1) / 2, y1 + 32, "FLOP a byte moved", "axis", "middle"))
    labels.append(_text(x0, y0 + 2, "FLOP/s", "note", dx=5))
    parts.append(_line(x0, y0, x0, y1, "grid") + _line(x0, y1, x1, y1, "grid"))
    for bandwidth, name in ((cache, "cache"), (memory, "memory")):
        if bandwidth is None:
            continue
        # from the left or the bottom edge, whichever the slope meets first, up to the flat roof
        start = max(10.0**left, 10.0**bottom / bandwidth)
        parts.append(_line(x_of(start), y_of(start * bandwidth), x_of(peak / bandwidth), y_of(peak), f"roof {name}"))
        if peak / bandwidth > 1.3 * start:
            middle = start * (peak / bandwidth / start) ** 0.3  # few steps have so little to compute
            words = f"{name} {bandwidth / 1e9:.0f} GB/s"
            at = x_of(middle), y_of(middle * bandwidth)
            # beside its line, on the side where the other one is not
            above = name == "cache"
            labels.append(
                _text(
                    at[0], at[1] + (-4 if above else 12), words, "note", "end" if above else "start", -4 if above else 8
                )
            )
    parts.append(_line(x_of(peak / (cache or memory)), y_of(peak), x1, y_of(peak), "roof"))
    labels.append(_text(x1, y_of(peak) - 5, f"peak {si(peak, 'FLOP/s')}", "note", "end"))
    for x, y, step in points:
        note = f"{step.name}: {step.gflops:.0f} GFLOP/s at {x:.1f} FLOP a byte, {step.ms:.3f} ms"
        radius = 3 + 9 * math.sqrt(step.ms / it.steps_ms)
        parts.append(
            f'<circle class="dot {colour_of(step.op)}" cx="{x_of(x):.3f}%" cy="{y_of(y):.1f}" r="{radius:.1f}">'
            f"<title>{escape(note)}</title></circle>"
        )
    return _svg(306, "rate of each step under the machine's roofs", [*parts, *labels])
