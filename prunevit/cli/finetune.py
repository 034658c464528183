"""``prunevit finetune``: recover the accuracy of a pruned model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .._atomic import expect_replaceable
from ..errors import PruningError, expect
from ._models import expect_there
from ._options import BatchSize, Data, Device, Model, Out, Pretrained, Seed, Workers, pairs
from ._output import Json, count, percent, reporting, table

Teacher = Annotated[str | None, typer.Option(help="A timm model or checkpoint directory to learn from (distillation).")]
Distillation = Annotated[
    Literal["soft", "hard", "feature"] | None, typer.Option(help="What is learnt from the teacher; soft by default.")
]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
LearningRate = Annotated[float, typer.Option("--lr", min=0, help="Peak learning rate.")]
RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="Any other option of training: mixup=0.8, opt=lamb, ema_decay=0.999, amp=true."
    ),
]
State = Annotated[
    Path | None, typer.Option(help="Write the run here after each epoch; an interrupted one resumes from it.")
]
NewClasses = Annotated[bool, typer.Option("--new-classes", help="Train a new classifier for the data's own classes.")]

OWNERS = {name: f"--{name}" for name in ("epochs", "lr", "distillation")}


def command(
    model: Model,
    data: Data,
    out: Out,
    epochs: Epochs = 30,
    teacher: Teacher = None,
    distillation: Distillation = None,
    lr: LearningRate = 5e-4,
    recipe: RecipeOption = None,
    state: State = None,
    new_classes: NewClasses = False,
    pretrained: Pretrained = True,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune a checkpoint or a timm model, or distil a teacher into it, and write the result.

    Under torchrun (torchrun --nproc-per-node 2 -m prunevit finetune …) a step is one batch of each process.
    """
    given = pairs(recipe, "--recipe", OWNERS) | ({} if distillation is None else {"distillation": distillation})
    if distillation is not None and teacher is None:
        raise typer.BadParameter("expected a teacher to distil", param_hint="--teacher")
    first = os.environ.get("RANK", "0") == "0"  # torchrun starts several: one of them speaks and writes
    with reporting(as_json, quiet=not first) as output:
        expect_there(model, data)
        expect_replaceable(out)
        if teacher is not None:
            expect_there(teacher)
        import torch

        from .. import api
        from ..models.from_timm import as_pruned
        from ..pruning import Recipe, accuracy, recover
        from ._models import data_for, device_of, open_model

        options = {"epochs": epochs, "lr": lr, "seed": seed, **given}
        Recipe.of(options)
        where = device_of(device)
        torch.manual_seed(seed)
        opened = open_model(model, pretrained=pretrained)
        student = as_pruned(opened)
        source, config = data_for(student, data, new_classes=new_classes)
        if new_classes:
            student.reset_classifier(len(source.label_names))
            student.pretrained_cfg = {**student.pretrained_cfg, "num_classes": len(source.label_names)}
        student.pretrained_cfg = {**student.pretrained_cfg, "label_names": list(source.label_names)}
        student.to(where)
        dense = None if teacher is None else open_model(teacher, or_random=False).to(where)
        if dense is not None:
            _expect_same_images(dense, config)
        train = source.loader("train", config, batch_size=batch_size, augment=True, seed=seed, workers=workers)
        held_out = source.loader("validation", config, batch_size=batch_size, workers=workers)
        before = accuracy(student.eval(), held_out)
        try:
            with output.bar("training") as bar:
                history = recover(
                    student, train, teacher=dense, validation=held_out, state=state, on_step=bar.step,
                    on_epoch=lambda facts: output.say(_told(facts, epochs)), **options,
                )  # fmt: skip
        finally:
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        if not first:
            return
        last = history[-1]  # a state of recover() without validation has no accuracy
        after = last["accuracy"] if "accuracy" in last else accuracy(student, held_out)
        student.eval()
        student.provenance = {**student.provenance, "accuracy": {"validation": after, "data": data}}
        written = api.save(student, out)
        result = {
            "model": model,
            "out": str(written),
            "data": data,
            "epochs": epochs,
            "teacher": teacher,
            "recipe": given,
            "seed": seed,
            "processes": int(os.environ.get("WORLD_SIZE", "1")),
            "images": source.size("train"),
            "accuracy": {"split": "validation", "before": before, "after": after},
            "history": history,
        }
        rows = [("validation top-1", percent(before, 2), percent(after, 2))]
        title = f"{model}, {count(len(history), 'epoch')} on {data}"
        output.done(result, table(("", "before", "after"), rows, title=title))
        output.say(f"wrote {written}")


def _told(facts: Mapping[str, float], epochs: int) -> str:
    return (
        f"epoch {facts['epoch'] + 1:.0f} of {epochs}: loss {facts['loss']:.3f}, "
        f"validation top-1 {percent(facts['accuracy'], 2)}"
    )


def _expect_same_images(teacher: Any, config: dict[str, Any]) -> None:
    """Both are shown the same tensors: of a size that the teacher takes, normalised as it is used to."""
    from ..data import data_config

    cfg = teacher.pretrained_cfg
    takes = tuple(cfg["input_size"]) if cfg.get("input_size") else config["input_size"]
    own, size = data_config(cfg, takes), config["input_size"]
    fits = takes == size or (takes[0] == size[0] and not cfg.get("fixed_input_size"))
    what = "a teacher that takes the model's images, of"
    expect(fits, PruningError, f"{what} {' × '.join(map(str, size))}", got=" × ".join(map(str, takes)))
    for name in ("mean", "std"):
        wanted, found = (tuple(of[name]) for of in (config, own))
        expect(found == wanted, PruningError, f"{what} {name} {wanted}", got=found)
