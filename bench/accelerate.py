"""What accelerate gains over the same model in eager PyTorch, on this machine's CPU.

    python bench/accelerate.py --batch 1,8 --threads 2

All run in one process, as they do in a user's, in turns: a ratio is the median over rounds of eager's time over the
other's in the same round. ``contents`` and ``versions`` are accelerate's two ways to know that weights are unchanged;
``repack`` is the first call after a change.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Annotated, Any

import timm
import torch
import typer

from prunevit import PrunedViT, shapes
from prunevit._machine import machine
from prunevit.nn import accelerate
from prunevit_kernels.library import packs


def eager_models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "deit_small_patch16_224 (timm)": timm.create_model("deit_small_patch16_224").eval(),
        "snp_deit_small (PrunedViT)": PrunedViT(shapes.get("snp_deit_small")).eval(),
    }


def seconds(model: Any, images: torch.Tensor) -> float:
    start = time.perf_counter()
    model(images)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(eager: Any, batch: int, rounds: int) -> dict[str, float]:
    images = torch.randn(batch, 3, 224, 224)
    contents, versions = (accelerate(copy.deepcopy(eager), check=check) for check in ("contents", "versions"))  # type: ignore[arg-type]
    impls = {"eager": eager, "contents": contents, "versions": versions}
    for _ in range(3):
        for model in impls.values():
            model(images)
    times: dict[str, list[float]] = {name: [] for name in impls}
    for _ in range(rounds):
        for name, model in impls.items():
            times[name].append(seconds(model, images))
    packs.clear()
    repack = seconds(contents, images)
    row = {f"{name}_ms": 1e3 * statistics.median(t) for name, t in times.items()}
    for name in ("contents", "versions"):
        row[f"eager_over_{name}"] = statistics.median(e / t for e, t in zip(times["eager"], times[name]))
    return row | {"repack_ms": 1e3 * repack}


def main(
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch and of the kernels.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of turns.")] = 15,
) -> None:
    torch.set_num_threads(threads)
    print(machine())
    for name, eager in eager_models().items():
        for size in map(int, batch.split(",")):
            row = measure(eager, size, rounds)
            print(f"{name}, batch {size}:", ", ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
