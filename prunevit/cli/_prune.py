"""What ``prunevit prune`` does once it knows what is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .. import api
from .._units import si
from ..errors import PruningError, expect
from ..models.from_timm import as_pruned
from ..models.vit import PrunedViT
from ..pruning import METHODS, Ranking, Step
from ..pruning.auto import Auto
from ..pruning.journal import Probe, journal_of, plot_journal
from ..spec import ViTSpec
from ._budgets import LOOKS_AT_IMAGES, Constraints, names_of
from ._measure import accuracy
from ._models import data_for, device_of, is_checkpoint, open_model, spec_of
from ._output import Bar, Output, count, percent, table


@dataclass(frozen=True)
class Request:
    """The command line, read."""

    model: str
    out: Path
    methods: list[str]
    constraints: Constraints | list[Constraints]
    options: dict[str, Any]
    deployment: dict[str, Any]
    ratios: Path | None
    shape: str | None
    rounds: int
    recovery_epochs: int
    recipe: dict[str, Any]
    trains: bool
    plot: Path | None
    data: str | None
    images: int | None
    batch_size: int
    workers: int
    device: str | None
    pretrained: bool
    seed: int

    @property
    def method_names(self) -> set[str]:
        return names_of(self.methods)

    @property
    def constraint_names(self) -> set[str]:
        each = self.constraints if isinstance(self.constraints, list) else [self.constraints]
        return {name for mapping in each for name in mapping}


def run(request: Request, output: Output) -> None:
    """Prune, save, and report."""
    expect(os.environ.get("WORLD_SIZE", "1") == "1", PruningError, "one process (recover with several)", got="torchrun")
    _expect_options(request)
    device = device_of(request.device)
    opened = open_model(request.model, pretrained=request.pretrained)
    dense = as_pruned(opened).to(device).eval()
    methods, options = request.methods, _options(request)
    loaders = _loaders(request, dense, options)
    with TemporaryDirectory() as scratch, output.bar(f"pruning by {', '.join(request.methods)}") as bar:
        if "auto" in request.method_names:
            options["on_probe"] = lambda probe: bar.show(_told(probe), 0, None)
            if request.plot is not None:
                options.setdefault("journal", str(Path(scratch, "journal")))
        calibration = loaders.pop("data", None)
        counted = None if calibration is None else len(calibration.dataset)
        if calibration is not None and not request.trains:
            calibration = bar.over(calibration)
        pruned = api.prune(
            dense, methods[0] if len(methods) == 1 else methods, request.constraints, calibration, seed=request.seed,
            on_step=lambda step: _show_step(bar, step),
            on_timing=lambda done, wanted: bar.show("timing steps for the latency table", done, wanted),
            **loaders, **options,
        )  # fmt: skip
        if "journal" in options:  # a budget of latency may have taken several attempts
            attempts = pruned.provenance.get("latency", {}).get("attempts", 1)
            options["journal"] = journal_of(options["journal"], attempt=attempts)
        if request.plot is not None:
            plot_journal(options["journal"], request.plot)
    result = {**_report(request, dense, pruned, options), "images": counted}
    if "validation" in loaders:
        before, after = (accuracy(m.eval(), loaders["validation"], device).top1 for m in (dense, pruned))
        result["accuracy"] = {"split": "validation", "before": before, "after": after}
        pruned.provenance |= {"accuracy": {"validation": after, "data": request.data}}
    pruned.provenance.setdefault("base_model", request.model)
    result["out"] = str(api.save(pruned, request.out))
    output.done(result, _table(request, dense.spec, pruned.spec, result))
    output.say(f"wrote {request.out}; recover its accuracy with: prunevit finetune {request.out} --data … --out …")


def _expect_options(request: Request) -> None:
    """Keywords of :func:`prunevit.prune` beyond those of methods and ranking have options of their own here."""
    kinds: list[Any] = [Ranking, *(METHODS[name] for name in request.method_names)]
    known = [field.name for kind in kinds for field in fields(kind)]
    unknown = sorted(set(request.options) - set(known))
    what = f"options of {', '.join(request.methods)} out of {', '.join(sorted(known))}"
    expect(not unknown, PruningError, what, got=", ".join(unknown))


def _options(request: Request) -> dict[str, Any]:
    """The keywords of :func:`prunevit.prune`."""
    options = dict(request.options)
    if request.constraint_names & {"latency", "memory"}:
        options["on"] = {name: value for name, value in request.deployment.items() if value is not None}
    if request.ratios is not None:
        options["pruning_ratio"] = _ratios(request.ratios)
    if request.shape is not None:
        options["shape"] = spec_of(request.shape)[0] if is_checkpoint(request.shape) else request.shape
    if request.rounds > 1:
        options["rounds"] = request.rounds
    if request.recovery_epochs:
        options["recovery"] = {**request.recipe, "epochs": request.recovery_epochs}
    if request.recipe and {"gohsp", "auto"} & request.method_names:
        options["recipe"] = request.recipe
    if request.images is not None and request.method_names & set(LOOKS_AT_IMAGES) - {"auto"}:
        options.setdefault("images", request.images)
    return options


def _images(request: Request, options: Mapping[str, Any]) -> int | None:
    """How many calibration images the methods look at, the most of any: as told, or its own number. None is all."""
    told = options.get("images", 1)
    fits = told is None or (type(told) is int and told >= 1)
    expect(fits, PruningError, "a number of images of at least 1", got=repr(told))
    counts: list[int | None] = []
    for name in request.method_names & set(LOOKS_AT_IMAGES):
        # auto has no number of its own: its scorer takes what it takes by itself
        scorer = str(options.get("scorer", Auto.scorer)) if name == "auto" else name
        own: int | None = getattr(METHODS.get(scorer), "images", 0)
        counts.append(own if name == "auto" else options.get("images", own))
    most = None if None in counts else max((count for count in counts if count is not None), default=0)
    return min((count for count in (request.images, most) if count is not None), default=None)


def _loaders(request: Request, model: PrunedViT, options: Mapping[str, Any]) -> dict[str, Any]:
    """data, train and validation: each from a split of its own, where the methods look at it."""
    if request.data is None:
        return {}
    source, config = data_for(model, request.data)
    common: dict[str, Any] = {"batch_size": request.batch_size, "workers": request.workers}
    loaders: dict[str, Any] = {}
    if (images := _images(request, options)) != 0:
        loaders["data"] = source.loader("calibration", config, images=images, **common)
    if request.trains:
        loaders["train"] = source.loader("train", config, augment=True, seed=request.seed, **common)
    if request.trains or "auto" in request.method_names:
        loaders["validation"] = source.loader("validation", config, **common)
    return loaders


def _ratios(path: Path) -> Mapping[str, float]:
    import yaml  # reads JSON too

    try:
        ratios = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "problem", None) or type(error).__name__
        raise PruningError(f"{path}: expected a JSON or YAML file of ratios by address, got: {reason}") from None
    fine = isinstance(ratios, dict) and all(
        isinstance(name, str) and isinstance(ratio, int | float) for name, ratio in ratios.items()
    )
    expect(fine, PruningError, f"ratios by address in {path}, such as blocks.0.mlp: 0.5", got=f"{ratios!r:.80}")
    return {str(name): float(ratio) for name, ratio in ratios.items()}


def _show_step(bar: Bar, step: Step) -> None:
    bar.show(f"training, loss {step.loss:.3f}", step.step, step.total)


def _told(probe: Probe) -> str:
    return (
        f"round {probe.round}, {probe.part} {probe.gone:.1%} gone: {probe.accuracy:.1%} right at cost {probe.cost:.1%}"
    )


def _report(request: Request, dense: PrunedViT, pruned: PrunedViT, options: Mapping[str, Any]) -> dict[str, Any]:
    before, after = dense.spec, pruned.spec
    result: dict[str, Any] = {
        "model": request.model,
        "out": str(request.out),
        "method": request.methods,
        "constraints": request.constraints,
        "seed": request.seed,
        "macs": {"before": before.macs(), "after": after.macs(), "ratio": after.macs() / before.macs()},
        "params": {"before": before.params(), "after": after.params(), "ratio": after.params() / before.params()},
        "latency": pruned.provenance.get("latency"),
        "memory": None,
        "journal": options["journal"] if "journal" in request.options else None,
        "plot": None if request.plot is None else str(request.plot),
    }
    if "on" in options:
        deployment = api.Deployment.of(options["on"])
        sizes = deployment.memory(before), deployment.memory(after)
        result["memory"] = {"before": sizes[0], "after": sizes[1], "ratio": sizes[1] / sizes[0]}
    return result


def _table(request: Request, before: ViTSpec, after: ViTSpec, result: Mapping[str, Any]) -> Any:
    title = f"{request.model} pruned by {', '.join(request.methods)}"
    made = table(("", "before", "after", "kept"), (), title=title)
    for name, key, unit in (("MACs", "macs", ""), ("parameters", "params", ""), ("memory", "memory", "B")):
        if (row := result[key]) is not None:
            made.add_row(name, si(row["before"], unit), si(row["after"], unit), percent(row["ratio"]))
    made.add_row(
        "residual width", str(before.embed_dim), str(after.embed_dim), percent(after.embed_dim / before.embed_dim)
    )
    if (took := result["latency"]) is not None:
        dense, measured = took["dense_ms"], took["measured_ms"]
        made.add_row("latency", f"{dense:.2f} ms", f"{measured:.2f} ms", percent(measured / dense))
        made.caption = (
            f"latency of {count(took['batch'], 'image')}, {took['backend']} on {took['device']}, {took['dtype']}, "
            f"{count(took['threads'], 'thread')}: {took['predicted_ms']:.2f} ms by the table, "
            f"{took['measured_ms']:.2f} ms the whole model ({took['error']:+.1%}), {took['limit_ms']:.2f} ms asked for"
        )
        made.caption_justify = "left"
    if "accuracy" in result:
        share = result["accuracy"]
        made.add_row("validation top-1", percent(share["before"], 2), percent(share["after"], 2), "")
    return made
