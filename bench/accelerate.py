"""What accelerate gains over the same model in eager PyTorch, on this machine's CPU.

    python bench/accelerate.py --batch 1,8 --threads 2

All run in one process, as they do in a user's, in turns; each time is the best of the rounds. On a machine that others
use, ``--clock cpu --threads 1`` counts the processor's time instead of the wall's. ``contents`` and ``versions`` are
accelerate's two ways to know that weights are unchanged, ``repack`` is the first call after a change, and ``runtime``
is prunevit.Runtime.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
import typer

from prunevit import PrunedViT, Runtime, shapes
from prunevit._machine import machine
from prunevit.nn import accelerate
from prunevit_kernels.library import packs


def eager_models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "deit_small_patch16_224 (timm)": timm.create_model("deit_small_patch16_224").eval(),
        "snp_deit_small (PrunedViT)": PrunedViT(shapes.get("snp_deit_small")).eval(),
    }


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(model: Any, images: torch.Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    model(images)
    return clock() - start


@torch.inference_mode()
def measure(eager: Any, batch: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    images = torch.randn(batch, 3, 224, 224)
    contents, versions = (accelerate(copy.deepcopy(eager), check=check) for check in ("contents", "versions"))  # type: ignore[arg-type]
    runtime = Runtime(eager, device="cpu", backend="cpu", threads=torch.get_num_threads())
    impls = {"eager": eager, "contents": contents, "versions": versions, "runtime": runtime}
    for model in impls.values():
        model(images)
    times: dict[str, list[float]] = {name: [] for name in impls}
    for _ in range(rounds):
        for name, model in impls.items():
            times[name].append(seconds(model, images, clock))
    best = {name: 1e3 * min(taken) for name, taken in times.items()}
    packs.clear()
    repack = seconds(contents, images, clock)
    row = {f"{name}_ms": ms for name, ms in best.items()}
    row |= {f"eager_over_{name}": best["eager"] / best[name] for name in ("contents", "versions", "runtime")}
    return row | {"repack_ms": 1e3 * repack}


def main(
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch and of the kernels.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds of turns.")] = 15,
    clock: Annotated[str, typer.Option(help="wall or cpu.")] = "wall",
) -> None:
    torch.set_num_threads(threads)
    print(machine())
    for name, eager in eager_models().items():
        for size in map(int, batch.split(",")):
            row = measure(eager, size, rounds, CLOCKS[clock])
            print(f"{name}, batch {size}:", ", ".join(f"{key} {value:.2f}" for key, value in row.items()))


if __name__ == "__main__":
    typer.run(main)
