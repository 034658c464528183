"""``python -m prunevit.runtime.tune MODEL``: find what runs a model fastest on the GPU at hand, offline.

Tiles of the Triton kernels, and for each MLP the kernel that runs it.

    python -m prunevit.runtime.tune my_checkpoint --batch 1,8,64,256
    python -m prunevit.runtime.tune snp_deit_small --out tuning.json

MODEL is a checkpoint directory, whose tuning.json is written, or the name of a published shape. What other machines
found stays in the file. Nothing is ever tuned inside a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from prunevit_kernels import Target

from .. import shapes
from ..errors import InputError, expect
from ..models.vit import PrunedViT
from .engine import PackedPlan, Program
from .runtime import Runtime


def bound_ops(packed: PackedPlan, target: Target, images: Tensor) -> list[tuple[Any, list[Tensor]]]:
    """Every packed op with the buffers of one batch size. Random values: zeros would run faster."""
    program = Program(packed, target, tuple(images.shape))
    for storage in program.storage.values():
        storage.normal_()
    return list(zip(packed.ops, program.buffers(images)))


def tune_runtime(runtime: Runtime, batches: Iterable[int], file: Path, report: Callable[[str], None] = print) -> int:
    """Tune a runtime's ops for some batch sizes and add what is found to ``file``; returns how much it was."""
    from prunevit_kernels._launch import TritonOp
    from prunevit_kernels.fused_mlp._cuda import CudaMlp
    from prunevit_kernels.tune import choose_kernels, tune, with_tuning
    from prunevit_kernels.tuning import Tuning, machine_name

    expect(runtime.backend == "cuda", InputError, "the cuda backend to tune", got=f"backend {runtime.backend}")
    target = runtime.target
    machine = machine_name(target.device)
    # a file that cannot be read is found before an hour of measuring
    before = Tuning.read(file, machine) if file.exists() else Tuning(machine)
    packed, bound = PackedPlan.of(runtime.plan(), target), []
    for batch in batches:
        shape = (batch, runtime.spec.in_chans, *runtime.spec.img_size)
        bound += bound_ops(packed, target, torch.randn(shape, device=target.device, dtype=target.dtype))
    mlps = [(op, buffers[0]) for op, buffers in bound if isinstance(op, CudaMlp)]
    # the Triton pair is one of an MLP's kernels: it competes with the tiles that suit it
    tiled = [(op, buffers) for op, buffers in bound if isinstance(op, TritonOp)] + [(op.triton, [x]) for op, x in mlps]

    def keep(found: Tuning) -> None:
        before.joined(found).write(file)  # at once: whoever ends this has what is known

    # kernels first, with the tiles of the rules: they are few, and matter most
    kernels = choose_kernels(mlps, target, report, keep)
    tiles = tune(tiled, target, report, lambda found: keep(kernels.joined(found)))
    for op, _ in mlps:
        op.triton.target = with_tuning(target, tiles)
    found = tiles.joined(choose_kernels(mlps, target, report))
    keep(found)
    return len(found)


def main(
    model: Annotated[str, typer.Argument(help="A checkpoint directory, or a published shape's name.")],
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8,64,256",
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    out: Annotated[Path | None, typer.Option(help="The file to write; the checkpoint's tuning.json.")] = None,
) -> None:
    named = model in shapes.names() + shapes.names(dense=True)
    runtime = Runtime(PrunedViT(shapes.get(model)) if named else model, device="cuda", dtype=getattr(torch, dtype))
    file = out or (Path() if named else Path(model)) / "tuning.json"
    count = tune_runtime(runtime, [int(size) for size in batch.split(",")], file, typer.echo)
    typer.echo(f"{count} tiles and kernels in {file}")


if __name__ == "__main__":
    typer.run(main)
