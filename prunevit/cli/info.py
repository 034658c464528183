"""``prunevit info``: the ragged shape of a model, block by block."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._units import si
from ._output import Json, expect_picture, percent, reporting, table

if TYPE_CHECKING:
    from ..spec import ViTSpec

Model = Annotated[
    str, typer.Argument(help="A checkpoint directory, a published shape or a timm model.", show_default=False)
]
Plot = Annotated[Path | None, typer.Option(help="Draw the shape into this file (.png, .svg or .pdf).")]


def command(model: Model, plot: Plot = None, as_json: Json = False) -> None:
    """Show the heads, widths, parameters and MACs of each block; draw them with --plot."""
    expect_picture(plot, "--plot")
    with reporting(as_json) as output:
        from ._models import spec_of

        spec, dense = spec_of(model)
        result = {"model": model, **summary(spec, dense), "blocks": blocks(spec)}
        if plot is not None:
            from ..plots import plot_shape

            result["plot"] = str(plot_shape(spec, plot, name=Path(model).name, dense=dense))
        output.done(result, None if as_json else _table(model, spec, dense))
        if plot is not None:
            output.say(f"wrote {plot}")


def summary(spec: ViTSpec, dense: ViTSpec | None) -> dict[str, Any]:
    """The whole model in a few numbers; ratios are to ``dense`` where it is known."""
    made: dict[str, Any] = {
        "macs": spec.macs(),
        "params": spec.params(),
        "depth": spec.depth,
        "embed_dim": spec.embed_dim,
        "img_size": list(spec.img_size),
        "num_classes": spec.num_classes,
    }
    if dense is not None:
        made |= {"macs_ratio": spec.macs() / dense.macs(), "params_ratio": spec.params() / dense.params()}
    return made


def blocks(spec: ViTSpec) -> list[dict[str, Any]]:
    """Each block's widths and cost."""
    return [
        {
            "heads": block.num_heads,
            "qk": list(block.qk_dims),
            "v": list(block.v_dims),
            "mlp": block.mlp_dim,
            "tokens": tokens[1],
            "macs": cost.macs,
            "macs_share": cost.macs / spec.macs(),
            "params": cost.params,
        }
        for block, cost, tokens in zip(spec.blocks, spec.per_block(), spec.tokens())
    ]


def _table(name: str, spec: ViTSpec, dense: ViTSpec | None) -> Any:
    tokens = [kept for _, _, kept in spec.tokens()]
    selects = len(set(tokens)) > 1  # else a column of one number
    shape = (*(("tokens",) if selects else ()), "heads", "query-key", "value", "MLP")
    made = table(("block", *shape, "MACs", "share", "params"), (), title=name)
    for index, (block, cost) in enumerate(zip(spec.blocks, spec.per_block())):
        made.add_row(
            str(index),
            *((str(tokens[index]),) if selects else ()),
            str(block.num_heads) if block.has_attn else "removed",
            _widths(block.qk_dims),
            _widths(block.v_dims),
            str(block.mlp_dim) if block.has_mlp else "removed",
            si(cost.macs),
            percent(cost.macs / spec.macs()),
            si(cost.params),
        )
    inside = sum(cost.macs for cost in spec.per_block())
    outside = spec.params() - sum(cost.params for cost in spec.per_block())
    rest = spec.macs() - inside
    blank = [""] * len(shape)
    made.add_row("stem, head", *blank, si(rest), percent(rest / spec.macs()), si(outside), end_section=True)
    made.add_row("all", *blank, si(spec.macs()), "", si(spec.params()))
    caption = f"width {spec.embed_dim}, {spec.img_size[0]} × {spec.img_size[1]} px, {spec.num_classes} classes"
    if dense is not None:
        kept = [percent(one / all_, 0) for one, all_ in ((spec.macs(), dense.macs()), (spec.params(), dense.params()))]
        caption += f"; {kept[0]} of the dense model's MACs, {kept[1]} of its parameters"
    made.caption = caption
    made.caption_justify = "left"
    return made


def _widths(widths: tuple[int, ...]) -> str:
    """ "25 ×6" for six equal heads, else each."""
    if len(Counter(widths)) == 1 and len(widths) > 1:
        return f"{widths[0]} ×{len(widths)}"
    return " ".join(map(str, widths)) or "–"
