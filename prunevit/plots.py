"""Pictures: the ragged shape of a spec."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._units import si
from .spec import BlockSpec, ViTSpec

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

INK, SOFT, GHOST = "#1f2933", "#7b8794", "#e6e9ed"
QK, V, MLP = "#2f6db5", "#e8893b", "#3d9a74"
LINEAR, PRODUCTS = "#56697f", "#8a63b8"
ROW = 0.34  # inches a block
GAP = 0.16  # between two heads, as a share of the dense head's width


def plot_shape(spec: ViTSpec, path: str | Path, *, name: str = "", dense: ViTSpec | None = None) -> Path:
    """Draw each block's head widths, MLP width and share of the MACs into an image file (PNG, SVG or PDF).

    ``dense`` is what the spec was pruned from: it is drawn in grey behind, and the numbers are given as shares of it.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    height = 1.6 + ROW * max(spec.depth, 3)
    with rc_context({"font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, height), facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            1,
            3,
            width_ratios=(6.0, 2.4, 2.6),
            wspace=0.13,
            left=0.045,
            right=0.99,
            bottom=0.2 / height,
            top=1 - 1.2 / height,
        )
        heads, mlp, macs = (figure.add_subplot(grid[0, column]) for column in range(3))
        _draw_heads(heads, spec, dense)
        _draw_mlp(mlp, spec, dense)
        _draw_macs(macs, spec, dense)
        for axes in (heads, mlp, macs):
            _bare(axes, spec.depth)
        left = 0.045
        figure.text(left, 1 - 0.36 / height, name or "ViT", size=15, weight="bold", color=INK, va="center")
        figure.text(left, 1 - 0.66 / height, _summary(spec, dense), size=9.5, color=SOFT, va="center")
        figure.savefig(path, dpi=160)
    return path


def originals_of(spec: ViTSpec, dense: ViTSpec | None) -> tuple[BlockSpec, ...]:
    """What each block was pruned from, as far as that is known; else the blocks themselves."""
    return dense.blocks if dense is not None and dense.depth == spec.depth else spec.blocks


def head_unit(spec: ViTSpec, dense: ViTSpec | None) -> int:
    """The width that fills a head's place: a dense head's, which the score scale still tells."""
    both = (*spec.blocks, *originals_of(spec, dense))
    return max([1, *(max(round(b.attn_scale**-2), *b.qk_dims, *b.v_dims, 1) for b in both)])


def gone(present: bool) -> str:
    """What a sublayer without widths is: emptied, its output bias stays; removed, nothing does."""
    return "emptied" if present else "removed"


def _draw_heads(axes: Axes, spec: ViTSpec, dense: ViTSpec | None) -> None:
    """Each head a slot as wide as the dense head: above its query-key width, below its value width."""
    originals, unit = originals_of(spec, dense), head_unit(spec, dense)
    slots = max([1, *(block.num_heads for block in (*spec.blocks, *originals))])
    numbers = slots <= 8
    for row, (block, original) in enumerate(zip(spec.blocks, originals)):
        for slot in range(max(original.num_heads, block.num_heads)):
            axes.barh(row, unit, 0.72, left=slot * unit * (1 + GAP), color=GHOST, linewidth=0)
        for slot, widths in enumerate(zip(block.qk_dims, block.v_dims)):
            left = slot * unit * (1 + GAP)
            for width, colour, offset in zip(widths, (QK, V), (-0.18, 0.18)):
                axes.barh(row + offset, width, 0.34, left=left, color=colour, linewidth=0)
                if numbers:
                    inside = width > 0.28 * unit
                    axes.text(
                        left + width + (-1 if inside else 1) * 0.03 * unit,
                        row + offset + 0.01,
                        str(width),
                        size=6,
                        va="center_baseline",
                        ha="right" if inside else "left",
                        color="white" if inside else SOFT,
                    )
        if not block.num_heads:
            axes.text(0.03 * unit, row, gone(block.has_attn), size=7, va="center", color=SOFT)
        axes.text(-0.12 * unit, row, str(row), size=8, va="center", ha="right", color=SOFT)
    axes.set_xlim(0, slots * unit * (1 + GAP) - GAP * unit)
    _title(
        axes,
        [
            ("attention heads", INK),
            ("query-key width", QK),
            ("value width", V),
            *([("pruned", GHOST)] if dense else []),
        ],
    )


def _draw_mlp(axes: Axes, spec: ViTSpec, dense: ViTSpec | None) -> None:
    originals = originals_of(spec, dense)
    widest = max([1, *(block.mlp_dim for block in (*spec.blocks, *originals))])
    for row, (block, original) in enumerate(zip(spec.blocks, originals)):
        axes.barh(row, original.mlp_dim, 0.72, color=GHOST, linewidth=0)
        axes.barh(row, block.mlp_dim, 0.72, color=MLP, linewidth=0)
        inside = block.mlp_dim > 0.25 * widest
        text = str(block.mlp_dim or gone(block.has_mlp))
        at = block.mlp_dim - 0.02 * widest if inside else block.mlp_dim + 0.02 * widest
        colour = "white" if inside else SOFT
        axes.text(at, row, text, size=7, va="center", ha="right" if inside else "left", color=colour)
    axes.set_xlim(0, widest)
    _title(axes, [("MLP", INK), ("hidden width", MLP)])


def _draw_macs(axes: Axes, spec: ViTSpec, dense: ViTSpec | None) -> None:
    """Each block's share of all MACs of the dense model where there is one, else of the spec's own."""
    whole = (dense or spec).macs()
    costs = spec.per_block()
    ghosts = dense.per_block() if dense and dense.depth == spec.depth else costs
    widest = max([1, *(cost.macs for cost in [*costs, *ghosts])]) / whole
    for row, (cost, ghost) in enumerate(zip(costs, ghosts)):
        axes.barh(row, ghost.macs / whole, 0.72, color=GHOST, linewidth=0)
        left = 0.0
        for part, colour in (
            (cost.qkv_macs + cost.proj_macs, LINEAR),
            (cost.attn_macs, PRODUCTS),
            (cost.mlp_macs, MLP),
        ):
            axes.barh(row, part / whole, 0.72, left=left, color=colour, linewidth=0)
            left += part / whole
        axes.text(widest * 1.04, row, f"{100 * cost.macs / spec.macs():.1f} %", size=7, va="center", color=INK)
    axes.set_xlim(0, widest * 1.28)
    _title(axes, [("MACs", INK), ("qkv, proj", LINEAR), ("QKᵀ, AV", PRODUCTS), ("MLP", MLP)])


def _bare(axes: Axes, depth: int) -> None:
    axes.set_ylim(max(depth, 3) - 0.5, -0.5)
    axes.set_axis_off()


def _title(axes: Axes, words: list[tuple[str, str]]) -> None:
    """Words in their colours, one after another above the panel: the legend as well."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    boxes: list[Artist] = [TextArea(words[0][0], textprops={"color": words[0][1], "size": 9.5})]
    for word, colour in words[1:]:
        square = TextArea("■", textprops={"color": colour, "size": 8})
        text = TextArea(word, textprops={"color": SOFT if colour == GHOST else colour, "size": 8})
        boxes.append(HPacker(children=[square, text], pad=0, sep=3, align="baseline"))
    axes.add_artist(
        AnchoredOffsetbox(
            "lower left",
            child=HPacker(children=boxes, pad=0, sep=9, align="baseline"),
            pad=0,
            borderpad=0,
            frameon=False,
            bbox_to_anchor=(0, 1.012),
            bbox_transform=axes.transAxes,
        )
    )


def _summary(spec: ViTSpec, dense: ViTSpec | None) -> str:
    macs, params = spec.macs(), spec.params()
    parts = [f"{si(macs, 'MAC')} an image", f"{si(params)} parameters"]
    if dense is not None:
        parts = [
            f"{parts[0]}, {100 * macs / dense.macs():.0f} % of dense",
            f"{parts[1]}, {100 * params / dense.params():.0f} %",
        ]
    width = f"residual width {spec.embed_dim}"
    if dense is not None and dense.embed_dim != spec.embed_dim:
        width += f" of {dense.embed_dim}"
    size = " × ".join(str(side) for side in spec.img_size)
    return "   ·   ".join([f"{spec.depth} blocks", *parts, width, f"{size} px"])
