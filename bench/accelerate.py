"""What accelerate gains over the same model in eager PyTorch, on this machine's CPU.

    python bench/accelerate.py --batch 1,8 --threads 1,2

Each way to run a model has a process of its own; they take turns, and what is quoted is the median over rounds of the
ratios within a round. ``contents`` and ``versions`` are accelerate's two ways to know that weights are unchanged,
``blocks`` is contents with a hook on the final norm, so that the model runs block by block, ``repack`` is a first call
after a change, ``compiled`` is the contents model in torch.compile, and ``runtime`` is prunevit.Runtime.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer

from prunevit import PrunedViT, Runtime, shapes
from prunevit.benchmark import Peer, run_interleaved, serve, speedup, timed
from prunevit.machine import machine
from prunevit.nn import accelerate
from prunevit_kernels.library import packs

IMPLS = ("eager", "contents", "versions", "blocks", "repack", "compiled", "runtime")
QUICK = ("eager", "contents", "versions", "blocks", "runtime")
MODELS = ("deit_small_patch16_224", "snp_deit_small")


def eager_model(name: str) -> Any:
    if name in shapes.names():
        return PrunedViT(shapes.get(name)).eval()
    return timm.create_model(name).eval()


def build(impl: str, name: str, batch: int, threads: int) -> Callable[[], object]:
    """A call of the model, the way that ``impl`` says."""
    model, images = eager_model(name), torch.randn(batch, 3, 224, 224)
    if impl == "runtime":
        model = Runtime(model, device="cpu", backend="cpu", threads=threads)
    elif impl != "eager":
        accelerate(model, check="versions" if impl == "versions" else "contents")
    if impl == "blocks":
        model.norm.register_forward_hook(lambda *_: None)
    if impl == "compiled":
        model = torch.compile(model, fullgraph=True)
    if impl != "repack":
        return lambda: model(images)

    def first_call() -> None:
        packs.clear()
        model(images)

    return first_call


@torch.inference_mode()
def worker(job: dict[str, Any]) -> None:
    """For each line of seconds, answer with the milliseconds of as many calls."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    run = build(job["impl"], job["model"], job["batch"], job["threads"])
    run()
    run()
    serve(partial(timed, run))


def main(
    model: Annotated[str, typer.Option(help="Names of published shapes or of timm's models, with commas.")] = ",".join(
        MODELS
    ),
    batch: Annotated[str, typer.Option(help="Batch sizes, with commas.")] = "1,8",
    threads: Annotated[str, typer.Option(help="Threads of PyTorch and of the kernels, with commas.")] = "1,2",
    impls: Annotated[str, typer.Option(help=f"Among {', '.join(IMPLS)}, with commas.")] = ",".join(QUICK),
    rounds: Annotated[int, typer.Option(help="Rounds of turns.")] = 9,
    seconds: Annotated[float, typer.Option(help="How long a turn is.")] = 0.4,
) -> None:
    names = impls.split(",")
    unknown = sorted(set(names) - set(IMPLS))
    if unknown:
        raise typer.BadParameter(f"expected implementations among {', '.join(IMPLS)}, got {', '.join(unknown)}")
    print(json.dumps(machine()))
    for which in model.split(","):
        for count in map(int, threads.split(",")):
            for size in map(int, batch.split(",")):
                jobs = [Peer(name, {"model": which, "batch": size}, (str(Path(__file__).resolve()),)) for name in names]
                run_interleaved(jobs, threads=count, rounds=rounds, seconds=seconds)
                show(f"{which}, threads {count}, batch {size}", jobs)


def show(title: str, peers: list[Peer]) -> None:
    """Each one's median milliseconds, and how many times faster than the first it is."""
    cells = [f"{p.name} {p.quantile(0.5):.1f} ms ({speedup(p, peers[0]):.2f}×)" for p in peers]
    print(f"{title}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):
        worker(json.loads(sys.argv[1]))
    else:
        typer.run(main)
