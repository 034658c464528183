"""One op on every published shape: prunevit's C++ beside eager PyTorch, unpadded and padded, and torch.compile.

With ``--device cuda``, what ``_gpu.py`` compares.

Each implementation runs in a process of its own, stopped while another runs, and goes through all shapes in every
round. The floor of a shape is the larger of its operations over the measured multiply-add peak and its bytes over the
measured memory bandwidth, useful work only.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import _gpu
import torch
import torch.nn.functional as F
import typer
from _record import environment, write
from _show import table
from _works import TOKENS, Work, blocks_of, cost, make
from rich.console import Console
from torch import Tensor

from prunevit import shapes
from prunevit.benchmark import Peer, best_of, run_interleaved, serve, speedup, timed
from prunevit_kernels import FusedMlp, NormLinear, Op, RaggedAttention, Target
from prunevit_kernels.cpu import extension
from prunevit_kernels.ragged_attention import ragged_attention

IMPLS = ("prunevit", "eager", "eager padded", "torch.compile")
LANES = 16


def build(impl: str, op: str, work: Work, threads: int) -> Callable[[], object]:
    target = Target("cpu", threads=threads)
    made, buffers = make(op, work, target)
    if impl == "prunevit":
        return made.pack(target).bind(*buffers)
    if impl == "eager padded":
        return padded(op, work, target)
    function = unpadded(made)
    if impl == "torch.compile":
        function = torch.compile(function, dynamic=False)
    return lambda: function(buffers[0])


def unpadded(op: Op) -> Callable[[Tensor], Tensor]:
    if isinstance(op, RaggedAttention):
        return lambda qkv: ragged_attention(qkv, op.heads)
    if isinstance(op, NormLinear):
        return lambda x: F.linear(F.layer_norm(x, x.shape[-1:], eps=op.eps), op.weight, op.bias)
    assert isinstance(op, FusedMlp)

    def mlp(x: Tensor) -> Tensor:
        return x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:], eps=op.eps), op.w1, op.b1)), op.w2, op.b2)

    return mlp


def padded(op: str, work: Work, target: Target) -> Callable[[], object]:
    """Heads padded to one width, or output widths to 16, ahead of time: the padding itself is not timed."""
    if op == "ragged_attention":
        size = (work["batch"], len(work["qk"]), TOKENS)
        q, k = (torch.randn(*size, max(work["qk"])) for _ in range(2))
        v = torch.randn(*size, max(work["v"]))
        return lambda: F.scaled_dot_product_attention(q, k, v)
    up = -(-work["f"] // LANES) * LANES
    d = 2 * sum(work["qk"]) + sum(work["v"])
    wide = {**work, "f": up} if op == "fused_mlp" else {**work, "v": [*work["v"][:-1], work["v"][-1] + -d % LANES]}
    made, buffers = make(op, wide, target)
    function = unpadded(made)
    return lambda: function(buffers[0])


@torch.no_grad()
def worker(job: dict[str, Any]) -> None:
    """Build every shape, then for each line of seconds answer with each shape's median time in milliseconds."""
    torch.set_num_threads(job["threads"])
    torch._dynamo.config.recompile_limit = 10_000
    torch.manual_seed(0)
    if job["impl"] == "peak":
        native = extension()
        bandwidth = native.bandwidth(job["threads"], 1 << 28, 300)
        serve(lambda _: [native.fma_peak(job["threads"], 50)], bandwidth=bandwidth)
        return
    runs = [build(job["impl"], job["op"], work, job["threads"]) for work in job["works"]]
    for run in runs:
        run()
        run()
    serve(lambda seconds: [statistics.median(timed(run, seconds / len(runs), least=3)) for run in runs])


def measure(op: str, names: list[str], batches: list[int], threads: int, impls: list[str]) -> list[dict[str, Any]]:
    todo = blocks_of(op, names, batches)
    program = (str(Path(__file__).resolve()),)
    peers = [Peer(impl, {"op": op, "works": todo}, program) for impl in [*impls, "peak"]]
    console = Console(stderr=True)
    with console.status("") as status:
        run_interleaved(peers, threads=threads, rounds=5, seconds=0.03 * len(todo), progress=status.update)
    *measured, probe = peers
    peak = statistics.median(rate for sample in probe.samples for rate in sample)
    rows = []
    for i, work in enumerate(todo):
        flops, touched, _ = cost(op, work, itemsize=4)
        floor = max(flops / peak, touched / probe.facts["bandwidth"]) * 1e3
        one = {peer.name: peer.only(i) for peer in measured}
        ours = one.pop("prunevit", None)
        best = None if ours is None else best_of(one.values(), ours)
        for peer in [*([] if ours is None else [ours]), *one.values()]:
            ms = peer.quantile(0.5)
            rows.append(
                {
                    "op": op,
                    "shape": f"{work['name']}.block{work['block']}",
                    "batch": work["batch"],
                    "threads": threads,
                    "impl": peer.name,
                    "us": round(ms * 1e3, 1),
                    "gflops": round(flops / ms / 1e6, 1),
                    "fraction_of_peak": round(flops / ms * 1e3 / peak, 3),
                    "fraction_of_floor": round(floor / ms, 3),
                    "ratio_to_best_peer": None if best is None or peer is not ours else round(speedup(peer, best), 2),
                    "fma_peak_gflops": round(peak / 1e9, 1),
                    "bandwidth_gb_s": round(probe.facts["bandwidth"] / 1e9, 1),
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table a model, a line a block and batch: microseconds of every implementation, and how prunevit stands."""
    impls, first = list(dict.fromkeys(row["impl"] for row in rows)), rows[0]
    tables: dict[str, list[tuple[str, ...]]] = {}
    for i in range(0, len(rows), len(impls)):
        group = {row["impl"]: row for row in rows[i : i + len(impls)]}
        ours = group.get("prunevit", rows[i])
        model, _, block = ours["shape"].rpartition(".")
        ratio = ours["ratio_to_best_peer"]
        times = (f"{group[impl]['us']:.0f}" for impl in impls)
        share = (f"{ours['gflops']:.0f}", f"{ours['fraction_of_floor']:.0%}", f"{ratio:.2f}" if ratio else "–")
        tables.setdefault(model, []).append((block, str(ours["batch"]), *times, *share))
    peaks = f"peak {first['fma_peak_gflops']} GFLOP/s, memory {first['bandwidth_gb_s']} GB/s"
    for model, lines in tables.items():
        columns = ("block", "batch", *impls, "GFLOP/s", "of floor", "× best peer")
        Console().print(table(f"{first['op']} of {model}, µs; {peaks}", columns, lines))


def command(op: str) -> None:
    """The command line of one op's benchmark."""

    def main(
        device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
        shape: Annotated[str, typer.Option("--shapes", help="names, separated by commas")] = ",".join(shapes.names()),
        batch: Annotated[str, typer.Option(help="batch sizes, separated by commas; 1,8 and on a GPU 1,64,256")] = "",
        threads: Annotated[int, typer.Option(help="threads of every implementation")] = 2,
        impls: Annotated[str, typer.Option(help="implementations, separated by commas; all by default")] = "",
        out: Annotated[Path | None, typer.Option(help="folder for the CSV and JSON files")] = None,
        limit: Annotated[float, typer.Option(help="seconds after which a GPU begins no further shape")] = 300,
        tuning: Annotated[Path | None, typer.Option(help="on a GPU, the tuning.json that prunevit runs with")] = None,
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise typer.BadParameter(f"expected cpu or cuda, got {device}")
        known = IMPLS if device == "cpu" else _gpu.IMPLS[op]
        chosen = impls.split(",") if impls else list(known)
        if unknown := set(chosen) - set(known):
            raise typer.BadParameter(f"expected implementations among {', '.join(known)}, got {', '.join(unknown)}")
        batches = [int(b) for b in (batch or ("1,8" if device == "cpu" else "1,64,256")).split(",")]
        if device == "cuda":
            _gpu.expect_gpu()
            _gpu.bench(op, shape.split(","), batches, out, limit=limit, impls=chosen, tuning=tuning)
            return
        rows = measure(op, shape.split(","), batches, threads, chosen)
        show(rows)
        if out is not None:
            write({"environment": environment("float32", threads=threads), "rows": rows}, out / f"{op}-cpu.json")

    typer.run(main)


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
