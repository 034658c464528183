"""An explanation as one HTML page: no script, no other file, no network; light and dark; from a phone's width up."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from ..plots import head_unit
from .explain_svg import colour_of, roofline_picture, shape_picture, time_picture
from .explain_text import CALM, busy, cells

if TYPE_CHECKING:
    from .explain import Explanation, StepReport

WORDS = {
    "stem": "patch embedding",
    "qkv": "norm, qkv",
    "attention": "attention",
    "proj": "projection",
    "mlp": "MLP",
    "tokens": "token selection",
    "head": "head",
}


def page(it: Explanation) -> str:
    """The whole document."""
    style = files(__package__).joinpath("explain.css").read_text("utf-8")
    name = escape(it.model)
    notice = f'<p class="busy">{escape(_sentence(busy(it)))}.</p>' if it.peaks.calm < CALM else ""
    pruned = "pruned" if it.dense is not None else f"up to {head_unit(it.spec, None)}, a dense head's width"
    shape = {"qk": "query-key width", "v": "value width", "mlp": "MLP width", "ghost": pruned}
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}: where the time goes</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<p class="kicker">prunevit explain</p>
<h1>{name}</h1>
<p class="sub">{escape(_where(it))}</p>
</header>
<section class="tiles">
{_tiles(it)}
</section>
{notice}
<section>
<h2>Time, block by block</h2>
<p class="legend">{_legend(it)}</p>
{time_picture(it)}
{_by_op(it)}
</section>
<section>
<h2>The shape</h2>
<p class="legend">{_keys(shape)}</p>
{shape_picture(it.spec, it.dense)}
</section>
<section>
<h2>Against the machine</h2>
<p class="sub">Each dot is a step, as large as its share of the time. A dot near a roof is as fast as this machine
allows; one far below is held back by something else: softmax, norms, waiting, or too little work to share.</p>
<p class="legend">{_legend(it)}</p>
{roofline_picture(it)}
</section>
<section>
<h2>Every step</h2>
<div class="scroll">
<table>
<thead><tr><th>step</th><th>rows × in → out</th><th>MMAC</th><th>MB</th><th>ms</th><th>GFLOP/s</th><th>of peak</th>
<th>padding</th><th>floor</th><th>kernel</th></tr></thead>
<tbody>
{_rows(it)}
</tbody>
</table>
</div>
</section>
<section class="method">
<h2>How it was measured</h2>
{_method(it)}
</section>
</main>
</body>
</html>
"""


def _where(it: Explanation) -> str:
    device = it.machine["cpu"] if it.device == "cpu" else it.machine["gpu"] or it.device
    threads = f", {it.threads} threads" if it.device == "cpu" else ""
    return f"batch {it.batch}, {it.dtype}, backend {it.backend}, {device}{threads}"


def _tile(value: str, unit: str, words: str) -> str:
    return f'<div class="tile"><b>{value}<small> {unit}</small></b><span>{escape(words)}</span></div>'


def _tiles(it: Explanation) -> str:
    tiles = [
        _tile(f"{it.call_ms:.3g}", "ms", f"a call, {1e3 * it.batch / it.call_ms:.3g} images a second"),
        _tile(
            f"{it.peak_share:.0%}".removesuffix("%"), "%", f"of the machine's peak, {it.peaks.flops / 1e9:.3g} GFLOP/s"
        ),
    ]
    if it.dense_macs is not None:
        share = f"executed, {it.macs / it.dense_macs:.0%} of the dense model's {it.dense_macs / 1e9:.3g}"
    else:
        share = f"executed of the model's {it.spec.macs(it.batch) / 1e9:.3g}"
    tiles.append(_tile(f"{it.macs / 1e9:.3g}", "GMAC", share))
    if it.waste is not None:
        tiles.append(_tile(f"{100 * it.waste:.1f}", "%", "of the executed products are padding"))
    return "\n".join(tiles)


def _legend(it: Explanation) -> str:
    used = dict.fromkeys(colour_of(step.op) for step in it.steps)
    return _keys({style: words for style, words in WORDS.items() if style in used})


def _keys(words: dict[str, str]) -> str:
    """A legend whose entries never break between colour and word."""
    return " ".join(
        f'<span class="entry"><span class="{style} key"></span>{word}</span>' for style, word in words.items()
    )


def _by_op(it: Explanation) -> str:
    rows = []
    for op, ms, macs in it.by_op():
        rate = f"{2e-6 * macs / ms:.0f} GFLOP/s" if macs else ""
        share = ms / it.steps_ms
        bar = f'<span class="meter"><i class="{colour_of(op)}" style="width:{100 * share:.1f}%"></i></span>'
        rows.append(
            f"<tr><td>{escape(op)}</td><td>{ms:.3f} ms</td><td>{bar}</td><td>{share:.0%}</td><td>{rate}</td></tr>"
        )
    return f'<div class="scroll"><table class="ops"><tbody>{"".join(rows)}</tbody></table></div>'


def _rows(it: Explanation) -> str:
    rows, block = [], object()
    for step in it.steps:
        style = ' class="first"' if step.block != block else ""
        rows.append(f"<tr{style}>{_cells(step)}</tr>")
        block = step.block
    return "\n".join(rows)


def _cells(step: StepReport) -> str:
    name, work, *numbers, kernel = cells(step)
    numbers.append(f"{step.floor_ms:.3f}, {step.bound}")
    first = f'<td><span class="{colour_of(step.op)} key"></span>{escape(name)}</td><td>{escape(work)}</td>'
    middle = "".join(f"<td>{number}</td>" for number in numbers)
    return f'{first}{middle}<td title="{escape(step.why, quote=True)}">{escape(kernel)}</td>'


def _method(it: Explanation) -> str:
    whys = dict.fromkeys(f"{step.kernel}: {step.why}" for step in it.steps)
    whole, left_out = it.spec.macs(it.batch), ""
    if it.macs < whole:
        left_out = (
            f" The model has {whole / 1e9:.3f} GMAC, of which {it.macs / 1e9:.3f} run: what nobody reads, such as the "
            "last block's rows that pooling drops, is not computed."
        )
    cached = f"; {it.peaks.cache / 1e9:.0f} GB/s from cache" if it.peaks.cache else ""
    versions = ", ".join(f"{name} {found}" for name, found in it.machine["versions"].items() if found)
    lines = [
        f"Medians of {it.rounds} rounds. Each step was timed in its place among the others; the steps add up to "
        f"{it.steps_ms:.3f} ms, a whole call takes {it.call_ms:.3f} ms.",
        "MACs are useful multiply-accumulates: what pads a vector or a tile is counted under padding, softmax, norms "
        f"and activations nowhere.{left_out}",
        f"The peak is {it.peaks.probe}; {it.peaks.memory / 1e9:.0f} GB/s from memory{cached}. The floor of a step is "
        "its useful work at that peak, or its bytes at the memory's rate, whichever takes longer: a step whose data "
        "are cached may beat the second.",
        f"Buffers take {it.buffer_bytes / 1e6:.2f} MB, {it.padding_bytes / 1e6:.2f} of them padding.",
        "Kernels: " + "; ".join(whys) + ".",
        f"{it.machine['system']}, {versions}.",
    ]
    return "\n".join(f"<p>{escape(line)}</p>" for line in lines)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]
