"""One implementation on a GPU, in a process of its own: builds what a job names, then times it turn by turn.

Times are by events on the GPU's own clock. A whole model is called as its users call it; an op is captured in a CUDA
graph of ``REPEATS`` launches, ours and the peers' alike, so that what a launch costs the host does not count.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _works import OVERLAPPING, TOKENS, Cost, Work, make, padded_spec, up8
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunevit import PrunedViT, Runtime, shapes
from prunevit.benchmark import serve, timed
from prunevit.runtime.peaks import PeakProbe
from prunevit.runtime.work import exponentials, useful_bytes
from prunevit_kernels import Target
from prunevit_kernels._launch import TritonOp
from prunevit_kernels.fused_mlp._cuda import CudaMlp
from prunevit_kernels.target import PDL_VARIABLE
from prunevit_kernels.tuning import Tuning, machine_name

Run = Callable[[], object]
REPEATS = 10
COMPILED = {"compile max-autotune": "max-autotune", "compile reduce-overhead": "reduce-overhead"}


def model_of(job: dict[str, Any], work: Work) -> Run | None:
    """A whole model. Peers get the pruned model zero-padded to multiples of 8, or the dense original."""
    impl, dtype = job["impl"], getattr(torch, job["dtype"])
    torch.manual_seed(0)
    spec = shapes.get(work["name"])
    images = torch.randn(work["batch"], spec.in_chans, *spec.img_size, device=job["device"]).to(dtype)
    if impl == OVERLAPPING:
        if job["device"] != "cuda" or torch.cuda.get_device_capability() < (9, 0):
            return None
        os.environ[PDL_VARIABLE] = "1"
    if impl in ("prunevit", OVERLAPPING):
        backend = "cuda" if job["device"] == "cuda" else "torch"
        runtime = Runtime(
            PrunedViT(spec), device=job["device"], dtype=dtype, backend=backend, tuning=job.get("tuning")
        ).warmup(work["batch"])
        work["costs"] = costs_of(runtime, images)
        return lambda: runtime(images)
    if impl.startswith("dense "):
        impl, spec = impl.removeprefix("dense "), shapes.get(shapes.dense_of(work["name"]))
    else:
        spec = padded_spec(spec, grouped=impl == "eager grouped")
    model = PrunedViT(spec).eval().to(job["device"], dtype)
    if impl in COMPILED:
        model = torch.compile(model, mode=COMPILED[impl], dynamic=False)
    return lambda: model(images)


def costs_of(runtime: Runtime, images: Tensor) -> list[Cost]:
    """What each step of the plan costs at least."""
    engine = runtime._engine
    with engine.turn():
        program = engine.program(images)
        steps = zip(program.packed.plan.steps, program.buffers(images))
        batch, target = len(images), runtime.target
        return [
            (2 * step.macs * batch, useful_bytes(step.op, views, target), exponentials(step.op, views))
            for step, views in steps
        ]


def target_of(job: dict[str, Any]) -> Target:
    """The GPU; or, to try a benchmark where there is none, the reference on a CPU."""
    dtype, device = getattr(torch, job["dtype"]), torch.device(job["device"], 0)
    if device.type != "cuda":
        return Target("torch", dtype=dtype)
    tuning = Tuning.read(Path(job["tuning"]), machine_name(device)) if job.get("tuning") else None
    return Target("cuda", device, dtype, tuning=tuning)


def op_of(job: dict[str, Any], work: Work) -> Run | None:
    """One op on buffers of its own, in place where the op is; None where a kernel of ours does not take the shape."""
    impl, op = job["impl"], job["kind"]
    target = target_of(job)
    made, buffers = make(op, work, target)
    if impl.startswith("prunevit"):
        return ours(impl.removeprefix("prunevit").removeprefix(":"), made.pack(target), buffers, work)
    if op == "ragged_attention":
        return attention_peer(impl, work, target)
    function = padded(op, work, target)
    if impl == "inductor max-autotune":
        function = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
    x = torch.randn(work["batch"], TOKENS, up8(work["e"]), device=target.device).to(target.dtype)
    return lambda: function(x)


def ours(kernel: str, packed: Any, buffers: list[Tensor], work: Work) -> Run | None:
    """Our op as it is chosen or, of an MLP, by the kernel that is named; notes in ``work`` which one it is."""
    if not isinstance(packed, CudaMlp):  # another op, the reference on a CPU, or no extension: Triton alone
        work["kernel"] = "triton" if isinstance(packed, TritonOp) else None
        other = kernel not in ("", work["kernel"])
        return None if other else packed.bind(*buffers)
    (x,) = buffers
    if not kernel:
        work["kernel"] = "triton" if packed.serving(x) is not packed else packed.plan(x).kernel
        return packed.bind(x)
    work["kernel"] = kernel
    return packed.bind_with(x, kernel) if kernel in packed.candidates(x) else None


def attention_peer(impl: str, work: Work, target: Target) -> Run:
    """SDPA on heads zero-padded to one width, or one call for each class of widths; the padding itself is not timed.

    By the kernel that PyTorch chooses, or by the one that is named: none is the fastest at every width.
    """
    classes = [up8(max(qk, v)) for qk, v in zip(work["qk"], work["v"])]
    widths = {w: classes.count(w) for w in classes} if impl == "sdpa grouped" else {max(classes): len(classes)}
    backends = {"sdpa padded flash": SDPBackend.FLASH_ATTENTION, "sdpa padded cudnn": SDPBackend.CUDNN_ATTENTION}

    def random(heads: int, width: int) -> Tensor:
        return torch.randn(work["batch"], heads, TOKENS, width, device=target.device).to(target.dtype)

    qkvs = [[random(heads, width) for _ in range(3)] for width, heads in widths.items()]

    def run() -> None:
        with sdpa_kernel(backends[impl]) if impl in backends else nullcontext():
            for qkv in qkvs:
                F.scaled_dot_product_attention(*qkv)

    return run


def padded(op: str, work: Work, target: Target) -> Callable[[Tensor], Tensor]:
    """cuBLAS's linears around PyTorch's norm and activation, every width a multiple of 8."""
    e, f = up8(work["e"]), up8(work["f"])
    d = 2 * sum(up8(qk) for qk in work["qk"]) + sum(up8(v) for v in work["v"])

    def linear(out: int, inside: int) -> tuple[Tensor, Tensor]:
        weight, bias = torch.randn(out, inside) / inside**0.5, torch.randn(out)
        return weight.to(target.device, target.dtype), bias.to(target.device, target.dtype)

    if op == "norm_linear":
        weight, bias = linear(d, e)
        return lambda x: F.linear(F.layer_norm(x, (e,)), weight, bias)
    (w1, b1), (w2, b2) = linear(f, e), linear(e, f)
    return lambda x: x + F.linear(F.gelu(F.linear(F.layer_norm(x, (e,)), w1, b1)), w2, b2)


def captured(run: Run) -> Run:
    """``REPEATS`` launches as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            run()

    def replay(held: Run = run) -> None:  # whose buffers and weights the graph reads and writes
        graph.replay()

    return replay


def event_times(run: Run, seconds: float) -> list[float]:
    """Milliseconds of each call, for about ``seconds``."""
    until, times = time.perf_counter() + seconds, list[float]()
    while len(times) < 4 or time.perf_counter() < until:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(5)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(events)]
    return times


def peaks(job: dict[str, Any]) -> dict[str, float]:
    """FLOP/s, bytes/s and exponentials/s that this machine can do at most."""
    probe, until = PeakProbe(target_of(job)), time.perf_counter() + 0.5
    while time.perf_counter() < until:
        probe.sample()
    found = probe.result()
    return {"flops": found.flops, "bandwidth": found.memory, "exps": found.exps or math.inf}


@contextmanager
def alone(job: dict[str, Any]) -> Iterator[None]:
    """One process builds at a time, or probes: both measure. Whoever takes longer than it may holds nobody else up."""
    most = job["most"]

    def give_up() -> None:
        print(f"TimeoutError: not built in {most:.0f} s", file=sys.stderr, flush=True)
        os._exit(3)  # a call that waits for a kernel which hangs cannot be interrupted

    time.sleep(job["turn"])  # all have begun at once: they come to the lock a second apart
    with (Path(tempfile.gettempdir()) / "prunevit-gpu-build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        watch = threading.Timer(most or 0.0, give_up)
        watch.daemon = True
        if most is not None:
            watch.start()
        try:
            yield
        finally:
            watch.cancel()


def built(job: dict[str, Any]) -> list[Run | None]:
    """Every work of the job that can be done, warmed up."""
    runs = list[Run | None]()
    for work in job["works"]:
        run = model_of(job, work) if job["kind"] == "model" else op_of(job, work)
        if run is None:
            runs.append(None)
            continue
        for _ in range(3):
            run()
        graph = job["kind"] != "model" and job["device"] == "cuda"
        runs.append(captured(run) if graph else run)
    return runs


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 100_000
    if job["impl"] == "peak":
        with alone(job):
            found = peaks(job)
        serve(lambda _: [0.0], **found)
        return
    with alone(job):
        runs = built(job)
    time_of = event_times if job["device"] == "cuda" else timed
    repeats = 1 if job["kind"] == "model" or job["device"] != "cuda" else REPEATS
    costs = [work["costs"] for work in job["works"] if "costs" in work]
    kernels = [work.get("kernel") for work in job["works"]]

    def sample(seconds: float) -> list[float | None]:
        each = seconds / len(runs)
        return [None if run is None else statistics.median(time_of(run, each)) / repeats for run in runs]

    serve(sample, costs=costs, kernels=kernels)


if __name__ == "__main__":
    main()
