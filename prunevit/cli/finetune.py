"""``prunevit finetune``: recover the accuracy of a pruned model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ._options import BatchSize, Checkpoint, Data, Out, Seed, Workers
from ._output import Json, percent, reporting, table

Teacher = Annotated[str | None, typer.Option(help="A timm model or checkpoint directory to learn from (distillation).")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the training images.")]
LearningRate = Annotated[float, typer.Option("--lr", min=0, help="Peak learning rate.")]
NewClasses = Annotated[bool, typer.Option("--new-classes", help="Train a new classifier for the data's own classes.")]


def command(
    checkpoint: Checkpoint,
    data: Data,
    out: Out,
    epochs: Epochs = 30,
    teacher: Teacher = None,
    lr: LearningRate = 5e-4,
    new_classes: NewClasses = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Fine-tune a checkpoint, or distil a teacher into it, and write the result."""
    with reporting(as_json) as output:
        import torch

        from .. import api
        from ..pruning import recover
        from ._measure import accuracy
        from ._models import data_for, open_model

        torch.manual_seed(seed)
        model: Any = api.load(checkpoint)
        source, config = data_for(model, data, new_classes=new_classes)
        if new_classes:
            model.reset_classifier(len(source.label_names))
            model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": len(source.label_names)}
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": list(source.label_names)}
        dense = None if teacher is None else open_model(teacher)
        train = source.loader("train", config, batch_size=batch_size, augment=True, seed=seed, workers=workers)
        held_out = source.loader("validation", config, batch_size=batch_size, workers=workers)
        before = accuracy(model.eval(), held_out)
        with output.bar("training") as bar:
            history = recover(model, train, teacher=dense, on_step=bar.step, epochs=epochs, lr=lr, seed=seed)
        after = accuracy(model.eval(), held_out)
        model.provenance = {**model.provenance, "accuracy": {"validation": after.top1, "data": data}}
        written = api.save(model, out)
        result = {
            "model": str(checkpoint),
            "out": str(written),
            "data": data,
            "epochs": epochs,
            "teacher": teacher,
            "seed": seed,
            "images": source.size("train"),
            "accuracy": {"split": "validation", "before": before.top1, "after": after.top1},
            "history": history,
        }
        rows = [("validation top-1", percent(before.top1, 2), percent(after.top1, 2))]
        output.done(result, table(("", "before", "after"), rows, title=f"{checkpoint}, {epochs} epochs on {data}"))
        output.say(f"wrote {written}")
