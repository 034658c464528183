"""``prunevit prune``: from a dense or pruned ViT to a smaller one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._options import BatchSize, MaybeData, Out, Pretrained, Seed, Workers, constraint, words
from ._output import Json, percent, reporting, si, table

Model = Annotated[str, typer.Argument(help="A timm model by name, or a checkpoint directory.", show_default=False)]
Method = Annotated[list[str], typer.Option(help="How to choose what goes. Given several times: one after another.")]
Macs = Annotated[str | None, typer.Option(help="MACs that remain at most: 45% of the model's, or 2.0G.")]
Params = Annotated[str | None, typer.Option(help="Parameters that remain at most: 50%, or 10M.")]
Groups = Annotated[str | None, typer.Option(help="What may be pruned, comma-separated: head,qk,v,mlp,channel.")]
Ratio = Annotated[float | None, typer.Option(min=0, max=1, help="Share of every group to prune, instead of a budget.")]
Isomorphic = Annotated[bool, typer.Option("--isomorphic", help="Rank all units of a kind against each other.")]
Global = Annotated[bool, typer.Option("--global-pruning", help="Rank all units of all kinds against each other.")]
RoundTo = Annotated[int | None, typer.Option(min=1, help="Keep widths that are multiples of this.")]
Ignored = Annotated[
    str | None, typer.Option(help="Layers to leave alone, comma-separated: blocks.0.attn,blocks.11.mlp.")
]
ImageCount = Annotated[int, typer.Option(min=1, help="Calibration images that the scores are measured on.")]


def command(
    model: Model,
    out: Out,
    method: Method = ["snp"],  # noqa: B006 (typer reads it, nobody changes it)
    macs: Macs = None,
    params: Params = None,
    data: MaybeData = None,
    images: ImageCount = 64,
    groups: Groups = None,
    pruning_ratio: Ratio = None,
    isomorphic: Isomorphic = False,
    global_pruning: Global = False,
    round_to: RoundTo = None,
    ignored_layers: Ignored = None,
    pretrained: Pretrained = True,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Prune a ViT to a budget and write a checkpoint that the runtime executes in exactly its shape."""
    constraints = {
        name: limit for name, limit in (("macs", constraint(macs)), ("params", constraint(params))) if limit is not None
    }
    if not constraints and pruning_ratio is None:
        raise typer.BadParameter("expected a budget: --macs, --params or --pruning-ratio", param_hint="--macs")
    options: dict[str, Any] = {
        "groups": words(groups),
        "pruning_ratio": pruning_ratio,
        "isomorphic": isomorphic or None,
        "global_pruning": global_pruning or None,
        "round_to": round_to,
        "ignored_layers": words(ignored_layers),
    }
    with reporting(as_json) as output:
        from .. import api
        from ..models.from_timm import from_timm
        from ..models.vit import PrunedViT
        from ._models import data_for, open_model

        opened = open_model(model, pretrained=pretrained)
        before = (opened if isinstance(opened, PrunedViT) else from_timm(opened)).spec
        loader = None
        if data is not None:
            source, config = data_for(opened, data)
            loader = source.loader("calibration", config, images=images, batch_size=batch_size, workers=workers)
        methods = method[0] if len(method) == 1 else method
        given = {name: value for name, value in options.items() if value is not None}
        with output.bar(f"pruning by {', '.join(method)}", total=len(loader) if loader is not None else None) as bar:
            batches = bar.over(loader) if loader is not None else None
            pruned = api.prune(opened, methods, constraints, batches, seed=seed, **given)
        written = api.save(pruned, out)
        spec = pruned.spec
        result = {
            "model": model,
            "out": str(written),
            "method": method,
            "constraints": constraints,
            "seed": seed,
            "images": None if loader is None else len(loader.dataset),  # type: ignore[arg-type]
            "macs": {"before": before.macs(), "after": spec.macs(), "ratio": spec.macs() / before.macs()},
            "params": {"before": before.params(), "after": spec.params(), "ratio": spec.params() / before.params()},
        }
        rows = [
            ("MACs", si(before.macs()), si(spec.macs()), percent(spec.macs() / before.macs())),
            ("parameters", si(before.params()), si(spec.params()), percent(spec.params() / before.params())),
            ("residual width", before.embed_dim, spec.embed_dim, percent(spec.embed_dim / before.embed_dim)),
        ]
        output.done(
            result, table(("", "before", "after", "kept"), rows, title=f"{model} pruned by {', '.join(method)}")
        )
        output.say(f"wrote {written}; recover its accuracy with: prunevit finetune {written} --data … --out …")
