"""``python -m prunevit.runtime.compile_check``: every Triton kernel that the published shapes need, for absent GPUs.

Plans all shapes at the batch sizes, collects the distinct specialisations that their launches ask for, compiles each
for every architecture in parallel processes, and holds it to the limits of ``prunevit_kernels.compile_check``. The exit
status is 1 where one breaks a limit.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import torch
from torch import Tensor

from prunevit_kernels import Launch, PackedOp, Target
from prunevit_kernels._aot import Build, stand_in_target
from prunevit_kernels._launch import Call, TritonOp
from prunevit_kernels.compile_check import ARCHITECTURES, faults
from prunevit_kernels.target import available_cores
from prunevit_kernels.tune import Compilation, built

from .. import shapes
from ..models.vit import PrunedViT
from ..spec import TokenSelect, ViTSpec
from .engine import PackedPlan, Program
from .plan import make_plan

BATCHES = (1, 8, 64, 256)


class _Collects:
    """Stands in for a packed op: binding it notes the calls that it would make."""

    def __init__(self, packed: PackedOp, found: list[Call]) -> None:
        self.packed, self.found = packed, found

    def bind(self, *buffers: Tensor) -> Launch:
        if isinstance(self.packed, TritonOp):
            self.found += self.packed.calls(*buffers)
        return lambda: None


def specs() -> Iterable[tuple[str, ViTSpec]]:
    """The published shapes, and one that selects tokens: they have no such block."""
    for name in shapes.names():
        yield name, shapes.get(name)
    spec = shapes.get("snp_deit_small")
    select = TokenSelect(keep=98, before="mlp", rule="class_attention", fuse=True)
    blocks = [block.model_copy(update={"select": select}) if i == 3 else block for i, block in enumerate(spec.blocks)]
    yield "snp_deit_small with EViT's selection", spec.model_copy(update={"blocks": tuple(blocks)})


def calls_of(spec: ViTSpec, target: Target, batches: Iterable[int]) -> list[Call]:
    """What a runtime on a GPU would launch for a spec."""
    found = list[Call]()
    packed = PackedPlan.of(make_plan(spec, PrunedViT(spec).state_dict(), target), target)
    packed.ops = [_Collects(op, found) for op in packed.ops]
    for batch in batches:
        Program(packed, target, (batch, spec.in_chans, *spec.img_size), recorded=True)
    return found


def specialisations(dtype: torch.dtype, batches: Iterable[int] = BATCHES) -> dict[str, Compilation]:
    """What is compiled, no two alike, with the shape that asked for it first."""
    target, found = stand_in_target(dtype), dict[Compilation, str]()
    for name, spec in specs():
        for call in calls_of(spec, target, batches):
            found.setdefault(Compilation.of(call), name)
    return {f"{name}: {work}": work for work, name in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prunevit.runtime.compile_check", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="80")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="bfloat16")
    parser.add_argument("--list", action="store_true", help="name the specialisations, compile nothing")
    options = parser.parse_args(arguments)
    begun, works = time.monotonic(), specialisations(getattr(torch, options.dtype))
    if options.list:
        print("\n".join(works))
        return 0
    broken, worst = 0, dict[int, Build]()
    with ProcessPoolExecutor(available_cores(), mp_context=get_context("spawn")) as pool:
        jobs = list(product(options.arch, works.items()))
        made = pool.map(built, [arch for arch, _ in jobs], [work for _, (_, work) in jobs])
        for (arch, (name, _)), build in zip(jobs, made):
            if arch not in worst or build.registers > worst[arch].registers:
                worst[arch] = build
            for fault in faults(build):
                print(f"{name}, sm_{arch}: {fault}", file=sys.stderr, flush=True)
                broken += 1
    for arch, build in worst.items():
        print(f"sm_{arch}: at most {build.registers} registers × {build.threads} threads ({build.name})")
    seconds = time.monotonic() - begun
    print(f"{len(works)} specialisations for {len(options.arch)} architectures in {seconds:.0f} s, {broken} faults")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
