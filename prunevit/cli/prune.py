"""``prunevit prune``: from a dense or pruned ViT to a smaller one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .._atomic import expect_replaceable
from ._budgets import KINDS, constraints_of, methods_of, names_of
from ._models import expect_there
from ._options import BackendChoice, BatchSize, Device, MaybeData, Model, Out, Pretrained, Seed, Workers, pairs, words
from ._output import Json, expect_picture, reporting

BUDGET, UNITS, DEPLOYMENT, TRAINING, SEARCH = (
    *("Budget: what may remain", "What may go", "Where it will run, for --latency and --memory"),
    *("Training and iterative pruning", "--method auto"),
)

Method = Annotated[
    list[str],
    typer.Option(
        help="How to choose what goes. Several, as a list or the option again, run one after another; "
        f"snp,taylor:head,mlp says which kinds each takes ({', '.join(KINDS)})."
    ),
]
Option = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Any option of the method or of the ranking: gamma=8, damping=0.5, min_kept=4."
    ),
]
Macs = Annotated[str | None, typer.Option(help="MACs: 45% of the model's, or 2.0G.", rich_help_panel=BUDGET)]
Params = Annotated[str | None, typer.Option(help="Parameters: 50%, or 10M.", rich_help_panel=BUDGET)]
Latency = Annotated[
    str | None, typer.Option(help="Time of a call in the runtime: 60%, or 20ms.", rich_help_panel=BUDGET)
]
Memory = Annotated[
    str | None, typer.Option(help="Weights and the runtime's buffers: 50%, or 50MB.", rich_help_panel=BUDGET)
]
Ratio = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share of every group to prune.", rich_help_panel=BUDGET)
]
Ratios = Annotated[
    Path | None,
    typer.Option(
        help="A JSON or YAML file of shares to prune by address: {blocks.0.attn.qk: 0.3}.", rich_help_panel=BUDGET
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(help="Exactly the widths of a published shape, or of a checkpoint.", rich_help_panel=BUDGET),
]
Groups = Annotated[str | None, typer.Option(help="Kinds, comma-separated: head,qk,v,mlp.", rich_help_panel=UNITS)]
Isomorphic = Annotated[
    bool, typer.Option("--isomorphic", help="Rank all units of a kind against each other.", rich_help_panel=UNITS)
]
Global = Annotated[
    bool, typer.Option("--global-pruning", help="Rank all units against each other.", rich_help_panel=UNITS)
]
RoundTo = Annotated[int | None, typer.Option(min=1, help="Keep multiples of this.", rich_help_panel=UNITS)]
Ignored = Annotated[
    str | None,
    typer.Option(help="Layers to leave alone, comma-separated: blocks.0.attn,blocks.11.mlp.", rich_help_panel=UNITS),
]
On = Annotated[str | None, typer.Option(help="cpu or cuda; as the runtime chooses.", rich_help_panel=DEPLOYMENT)]
Batch = Annotated[int, typer.Option(min=1, help="Images in a call.", rich_help_panel=DEPLOYMENT)]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Of the cpu backend; all cores.", rich_help_panel=DEPLOYMENT, show_default=False),
]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="fp32 on a CPU, bf16 on a GPU unless told otherwise.", rich_help_panel=DEPLOYMENT),
]
Backend = Annotated[BackendChoice, typer.Option(help="What executes it there.", rich_help_panel=DEPLOYMENT)]
Table = Annotated[
    Path | None, typer.Option(help="Keep the table of step times in this file.", rich_help_panel=DEPLOYMENT)
]
Remeasure = Annotated[bool, typer.Option("--remeasure", help="Measure that table anew.", rich_help_panel=DEPLOYMENT)]
Tolerance = Annotated[
    float,
    typer.Option(
        min=0.001, max=0.999, help="Between the table, the whole model and the budget.", rich_help_panel=DEPLOYMENT
    ),
]
Rounds = Annotated[int, typer.Option(min=1, help="Prune in as many rounds.", rich_help_panel=TRAINING)]
RecoveryEpochs = Annotated[
    int, typer.Option(min=0, help="Train so long after each round and method.", rich_help_panel=TRAINING)
]
Stages = Annotated[int | None, typer.Option(min=0, help="gohsp: soft stages.", rich_help_panel=TRAINING)]
StageEpochs = Annotated[int | None, typer.Option(min=1, help="gohsp: of each.", rich_help_panel=TRAINING)]
FinetuneEpochs = Annotated[
    int | None,
    typer.Option(min=0, help="gohsp: after the cut; auto: after each committed round.", rich_help_panel=TRAINING),
]
LearningRate = Annotated[float | None, typer.Option("--lr", min=0, help="Peak.", rich_help_panel=TRAINING)]
RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Any other option of training: mixup=0.8, opt=lamb.", rich_help_panel=TRAINING
    ),
]
Tau = Annotated[
    float | None, typer.Option(min=0, max=1, help="Accuracy that a round may lose.", rich_help_panel=SEARCH)
]
ScorerName = Annotated[
    str | None, typer.Option(help="Who ranks units: snp, magnitude, taylor, gohsp or random.", rich_help_panel=SEARCH)
]
JournalFile = Annotated[
    Path | None, typer.Option(help="Write every probe here; an interrupted search continues.", rich_help_panel=SEARCH)
]
Plot = Annotated[
    Path | None, typer.Option(help="Draw the search into this file (.png, .svg or .pdf).", rich_help_panel=SEARCH)
]
ImageCount = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Calibration images that scores are measured on; unless told otherwise 512 by taylor, 64 by the others.",
        show_default=False,
    ),
]

# what a method of another name would not read
OWNERS = {
    "stages": ("gohsp",),
    "stage_epochs": ("gohsp",),
    "finetune_epochs": ("gohsp", "auto"),
    "tau": ("auto",),
    "scorer": ("auto",),
}
RECIPE_OWNERS = {"epochs": "--recovery-epochs, --stage-epochs or --finetune-epochs", "lr": "--lr"}
UNUSED = {"device": None, "batch": 1, "backend": "auto", "tolerance": 0.05, "remeasure": False}


def command(
    model: Model,
    out: Out,
    method: Method = ["snp"],  # noqa: B006 (typer reads it, nobody changes it)
    data: MaybeData = None,
    images: ImageCount = None,
    macs: Macs = None,
    params: Params = None,
    latency: Latency = None,
    memory: Memory = None,
    pruning_ratio: Ratio = None,
    ratios: Ratios = None,
    shape: Shape = None,
    groups: Groups = None,
    isomorphic: Isomorphic = False,
    global_pruning: Global = False,
    round_to: RoundTo = None,
    ignored_layers: Ignored = None,
    on: On = None,
    batch: Batch = 1,
    threads: Threads = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
    table: Table = None,
    remeasure: Remeasure = False,
    tolerance: Tolerance = 0.05,
    rounds: Rounds = 1,
    recovery_epochs: RecoveryEpochs = 0,
    stages: Stages = None,
    stage_epochs: StageEpochs = None,
    finetune_epochs: FinetuneEpochs = None,
    lr: LearningRate = None,
    recipe: RecipeOption = None,
    tau: Tau = None,
    scorer: ScorerName = None,
    journal: JournalFile = None,
    plot: Plot = None,
    option: Option = None,
    device: Device = None,
    pretrained: Pretrained = True,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
    workers: Workers = 0,
    as_json: Json = False,
) -> None:
    """Prune a ViT to a budget and write a checkpoint that the runtime executes in exactly its shape.

    Methods; those with * measure on --data:
    magnitude  the norm of a unit's weights
    taylor *   how much the loss would change without the unit
    snp *      pairs by preserved attention scores, the rest by redundancy
    gohsp *    heads by similarity of attention maps; can train towards the cut
    auto *     searches ratios for attention and MLP that keep accuracy
    cp-vit *   drops tokens and heads that little attention is paid to
    evit       drops tokens, and fuses them into one
    random     by chance, to compare with

    Redundancy ranked values and MLP neurons worse than chance on digits and
    CIFAR-10 (docs/methods.md). Pairs by snp and the rest by magnitude:
    --method snp:qk,magnitude:v,mlp,channel --macs 90%,50%
    """
    methods = methods_of(method)
    constraints = constraints_of({"macs": macs, "params": params, "latency": latency, "memory": memory}, methods)
    if not constraints and pruning_ratio is None and ratios is None and shape is None:
        what = "expected a budget: --macs, --params, --latency, --memory, --pruning-ratio, --ratios or --shape"
        raise typer.BadParameter(what, param_hint="--macs")
    deployment = {
        "device": on,
        "batch": batch,
        "threads": threads,
        "dtype": dtype,
        "backend": backend,
        "table": table,
        "tolerance": tolerance,
        "remeasure": remeasure,
    }
    if latency is None and memory is None:
        _expect_unused(deployment)
    expect_picture(plot, "--plot")
    asked: dict[str, Any] = {
        "pruning_ratio": pruning_ratio,
        "groups": words(groups),
        "isomorphic": isomorphic or None,
        "global_pruning": global_pruning or None,
        "round_to": round_to,
        "ignored_layers": words(ignored_layers),
        "stages": stages,
        "stage_epochs": stage_epochs,
        "finetune_epochs": finetune_epochs,
        "tau": tau,
        "scorer": scorer,
        "journal": None if journal is None else str(journal),
    }
    given = {name: value for name, value in asked.items() if value is not None}
    options = given | pairs(option, "--option", {name: f"--{name.replace('_', '-')}" for name in given})
    if ratios is not None and "pruning_ratio" in options:
        raise typer.BadParameter("expected one pruning ratio or a file of them, got both", param_hint="--ratios")
    training = pairs(recipe, "--recipe", RECIPE_OWNERS) | ({} if lr is None else {"lr": lr})
    trains = bool(recovery_epochs or options.get("stages") or options.get("finetune_epochs"))
    if training and not trains:
        what = "expected something that trains: --recovery-epochs, --stages or --finetune-epochs"
        raise typer.BadParameter(what, param_hint="--recipe, --lr")
    _expect_owners(options, names_of(methods))
    searches = "auto" in names_of(methods)
    if (trains or searches) and data is None:
        what = f"expected images to {'train on' if trains else 'measure accuracy on'}"
        raise typer.BadParameter(what, param_hint="--data")
    if (plot or journal) and not searches:
        raise typer.BadParameter("expected --method auto, whose search they record", param_hint="--journal, --plot")
    if plot and (rounds > 1 or sum(name.partition(":")[0] == "auto" for name in methods) > 1):
        what = "expected one search to draw, got several (--journal FILE keeps each, as FILE, FILE.search2 and so on)"
        raise typer.BadParameter(what, param_hint="--plot")
    with reporting(as_json) as output:
        expect_there(model, data)
        expect_replaceable(out)
        from ._prune import Request, run

        request = Request(
            model=model,
            out=out,
            methods=methods,
            constraints=constraints,
            options=options,
            deployment=deployment,
            ratios=ratios,
            shape=shape,
            rounds=rounds,
            recovery_epochs=recovery_epochs,
            recipe=training,
            trains=trains,
            plot=plot,
            data=data,
            images=images,
            batch_size=batch_size,
            workers=workers,
            device=device,
            pretrained=pretrained,
            seed=seed,
        )
        run(request, output)


def _expect_unused(deployment: Mapping[str, Any]) -> None:
    """Where it will run matters for --latency and --memory alone: no option of it goes without a word."""
    given = [name for name, value in deployment.items() if value != UNUSED.get(name)]
    if given:
        hint = ", ".join(f"--{'on' if name == 'device' else name}" for name in given)
        raise typer.BadParameter("expected --latency or --memory, which it is for", param_hint=hint)


def _expect_owners(options: Mapping[str, Any], methods: Collection[str]) -> None:
    for name, owners in OWNERS.items():
        if name in options and not set(owners) & set(methods):
            hint = f"--{name.replace('_', '-')}"
            raise typer.BadParameter(f"expected --method {' or '.join(owners)}, whose option it is", param_hint=hint)
