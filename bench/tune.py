"""Find the fastest tiles for a model on the GPU at hand, and write them to tuning.json.

    python bench/tune.py snp_deit_small --batch 1,8,64,256 --out tuning.json
    python bench/tune.py my_checkpoint --dtype float16 --out my_checkpoint/tuning.json

A shape's name, or a checkpoint directory. Tiles that other machines found stay in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from prunevit import shapes
from prunevit.models.vit import PrunedViT
from prunevit.runtime import Runtime
from prunevit.runtime.engine import PackedPlan, Program
from prunevit.runtime.plan import Plan
from prunevit_kernels import Target
from prunevit_kernels._launch import TritonOp
from prunevit_kernels.tune import tune
from prunevit_kernels.tuning import Tuning


def bound_ops(plan: Plan, target: Target, images: Tensor) -> list[tuple[TritonOp[Any], list[Tensor]]]:
    """Every op that has tiles to choose, with buffers of one batch size. Random values: zeros would run faster."""
    packed = PackedPlan.of(plan, target)
    program = Program(packed, target, tuple(images.shape))
    for storage in program.storage.values():
        storage.normal_()
    every = zip(packed.ops, program.buffers(images))
    return [(op, buffers) for op, buffers in every if isinstance(op, TritonOp)]


def main(
    model: Annotated[str, typer.Argument(help="A published shape's name, or a checkpoint directory.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8,64,256",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    out: Annotated[Path, typer.Option(help="The file to write; what it has from other machines stays.")] = Path(
        "tuning.json"
    ),
) -> None:
    source = PrunedViT(shapes.get(model)) if model in shapes.names() + shapes.names(dense=True) else model
    runtime = Runtime(source, backend="cuda", dtype=getattr(torch, dtype))
    plan, target = runtime.plan(), runtime.target
    bound = []
    for size in batch.split(","):
        shape = (int(size), runtime.spec.in_chans, *runtime.spec.img_size)
        bound += bound_ops(plan, target, torch.randn(shape, device=target.device, dtype=target.dtype))
    found = tune(bound, target, report=typer.echo)
    before = Tuning.read(out, found.machine).tiles if out.exists() else {}
    Tuning(found.machine, {**before, **found.tiles}).write(out)
    typer.echo(f"{len(found.tiles)} tiles for {found.machine} in {out}")


if __name__ == "__main__":
    typer.run(main)
