"""Measure the candidate tiles of bound ops, and the kernels that can run a fused_mlp, on the GPU at hand, offline.

Nothing is ever tuned inside a request. Candidate tiles are compiled in parallel processes that need no GPU (Triton's
disk cache carries them over), and timed one by one in CUDA graphs as soon as all of a problem's are there: what a
launch costs the host does not count. What is known is handed over after every problem.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ._aot import Build, build, compiling_for
from ._configs import Problem, Tile, candidates
from ._launch import Call, TritonOp
from .fused_mlp._cuda import CudaMlp
from .target import Launch, Target, available_cores
from .tuning import Tuning, machine_name
from .units import dtype_name

Report = Callable[[str], None]
Keep = Callable[[Tuning], None]  # of all that has been found so far

MOST_PROCESSES = 32  # a container may have fewer cores than it is told of; each process takes half a gigabyte


@dataclass(frozen=True)
class Compilation:
    """All that decides what a call compiles to: no tensor, only their dtypes. Equal ones compile to the same."""

    module: str
    kernel: str
    args: tuple[Any, ...]
    constants: tuple[tuple[str, Any], ...]
    tile: Tile
    problem: Problem = field(compare=False)

    @classmethod
    def of(cls, call: Call) -> Compilation:
        fn = call.kernel.fn
        names = zip(call.args, call.kernel.params)
        # a size that is never specialised on is any size
        args = tuple(_kind(arg, bool(parameter.do_not_specialize)) for arg, parameter in names)
        return cls(fn.__module__, fn.__name__, args, tuple(call.constants.items()), call.tile, call.problem)

    def call(self) -> Call:
        kernel = getattr(import_module(self.module), self.kernel)
        return Call(kernel, 1, self.args, dict(self.constants), self.tile, self.problem)

    def __str__(self) -> str:
        constants = ", ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}({constants}), {self.tile.warps} warps, {self.tile.stages} stages"


def _kind(arg: Any, any_value: bool) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype
    return 7 if any_value and type(arg) is int else arg


def compiled(work: Compilation, capability: int) -> None:
    """Compile for a GPU that need not be there, into Triton's disk cache."""
    with compiling_for(capability, torch.bfloat16):
        work.call().compile()


def built(capability: int, work: Compilation) -> Build:
    """The same, and what the compiler made."""
    with compiling_for(capability, torch.bfloat16):
        return build(work.call())


@contextmanager
def compiling(calls: Iterable[Call], capability: int) -> Iterator[Mapping[Compilation, Future[None]]]:
    """Fills Triton's disk cache with what the calls need, in their order, beside whatever happens within."""
    every = dict.fromkeys(map(Compilation.of, calls))
    # spawned, not forked: CUDA does not survive a fork
    pool = ProcessPoolExecutor(min(available_cores(), MOST_PROCESSES), mp_context=get_context("spawn"))
    try:
        yield {work: pool.submit(compiled, work, capability) for work in every}
    finally:
        pool.shutdown(cancel_futures=True)


def measure(launch: Launch, repeats: int = 20, rounds: int = 5) -> float:
    """Median seconds a launch, over graphs of ``repeats`` launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            launch()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return float(statistics.median(times))


def tune(
    bound: Sequence[tuple[TritonOp[Any], Sequence[Tensor]]],
    target: Target,
    report: Report = lambda line: None,
    keep: Keep = lambda found: None,
) -> Tuning:
    """The fastest tile of every problem among ops with the buffers that they run on."""
    machine = machine_name(target.device)
    dtype = dtype_name(target.dtype)
    trials: dict[str, dict[Tile, tuple[TritonOp[Any], Sequence[Tensor]]]] = {}
    for packed, buffers in bound:
        for call in packed.calls(*buffers):
            others = candidates(call.problem)
            if others:  # the default comes first
                tiles = dict.fromkeys([call.tile, *others], (packed, buffers))
                trials.setdefault(call.problem.key(dtype), tiles)

    def with_tile(key: str, tile: Tile) -> Call:
        packed, buffers = trials[key][tile]
        before = packed.target
        packed.target = with_tuning(target, Tuning(machine, {key: tile}))
        try:
            return next(call for call in packed.calls(*buffers) if call.problem.key(dtype) == key)
        finally:
            packed.target = before

    major, minor = torch.cuda.get_device_capability(target.device)
    best: dict[str, Tile] = {}
    every = (with_tile(key, tile) for key, tiles in trials.items() for tile in tiles)
    with compiling(every, 10 * major + minor) as made, torch.cuda.device(target.device):
        report(f"{len(made)} kernels to compile for {len(trials)} problems")
        for key in trials:
            seconds = {tile: _time_of(with_tile(key, tile), made, report) for tile in trials[key]}
            best[key] = min(seconds, key=seconds.__getitem__)
            keep(Tuning(machine, best))
            default = next(iter(seconds.values()))
            report(f"{key}: {seconds[best[key]] * 1e6:.1f} µs with {best[key]}, {default * 1e6:.1f} µs by default")
    return Tuning(machine, best)


def choose_kernels(
    bound: Sequence[tuple[CudaMlp, Tensor]],
    target: Target,
    report: Report = lambda line: None,
    keep: Keep = lambda found: None,
) -> Tuning:
    """The fastest kernel of every fused_mlp problem among packed MLPs with the buffer that they run on."""
    dtype, machine = dtype_name(target.dtype), machine_name(target.device)
    best: dict[str, str] = {}
    with torch.cuda.device(target.device):
        for packed, x in bound:
            key = packed.problem(x).key(dtype)
            if key in best:
                continue
            values, seconds = x.clone(), dict[str, float]()
            for kernel in packed.candidates(x):
                x.copy_(values)  # each launch adds to it
                seconds[kernel] = measure(packed.bind_with(x, kernel))
            x.copy_(values)
            best[key] = min(seconds, key=seconds.__getitem__)
            keep(Tuning(machine, kernels=best))
            report(f"{key}: " + ", ".join(f"{name} {1e6 * s:.1f} µs" for name, s in _fastest_first(seconds)))
    return Tuning(machine, kernels=best)


def _fastest_first(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: item[1])


def _time_of(call: Call, made: Mapping[Compilation, Future[None]], report: Report) -> float:
    """Infinite for a tile that the compiler refuses, or that this GPU has no room for."""
    work = Compilation.of(call)
    try:
        made[work].result()
        launch = call.load()
    except BrokenExecutor:  # a process was killed: no tile is to blame
        raise
    except OutOfResources:
        return float("inf")
    except Exception as failure:  # whatever a compiler may raise, in another process
        report(f"{work}, {call.tile}: left out, {failure}")
        return float("inf")
    return measure(launch)


def with_tuning(target: Target, tuning: Tuning) -> Target:
    return dataclasses.replace(target, tuning=tuning)
