"""What can run a model on a CPU, each built as its users build it. Run as a process by ``interleaved.py``.

Reads one job as JSON from the command line, answers one line when built, then one line of times for each line of
seconds on standard input.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]

MODEL_PEERS = {
    "eager": None,
    "torch.compile": None,
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
}


def missing(impl: str) -> str | None:
    """Why a peer cannot run here, with the command that installs it; None where it can."""
    package = MODEL_PEERS.get(impl)
    needs = [package, "onnx", "onnxscript"] if package else []
    absent = [name for name in needs if name and find_spec(name) is None]
    return f"{', '.join(absent)} not installed: pip install -e '.[bench]'" if absent else None


def build_model(shape: str) -> torch.nn.Module:
    """A named shape with random weights; every peer gets the same ones."""
    from prunevit import shapes
    from prunevit.models.vit import PrunedViT

    torch.manual_seed(0)
    return PrunedViT(shapes.get(shape)).eval()


def onnx_file(job: dict[str, Any]) -> Path:
    """The shape at a static batch size as ONNX, exported once a machine: exporting takes longer than a benchmark."""
    from prunevit import shapes

    spec = shapes.get(job["shape"]).model_dump_json() + torch.__version__
    key = hashlib.sha256(spec.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / "prunevit-bench" / f"{job['shape']}-{job['batch']}-{key}.onnx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        images = torch.randn(job["batch"], 3, 224, 224)
        program = torch.onnx.export(
            build_model(job["shape"]), (images,), dynamo=True, verbose=False, input_names=["images"]
        )
        assert program is not None
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / "model.onnx"
            program.save(fresh, external_data=False)
            fresh.replace(path)
    return path


def prunevit_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    from prunevit.runtime import Runtime

    model, images = build_model(job["shape"]), torch.randn(job["batch"], 3, 224, 224)
    runtime = Runtime(model, device="cpu", backend="cpu", threads=job["threads"])
    runtime(images)
    return lambda: runtime(images), {"executed_macs": runtime.plan().macs}


def eager_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    model, images = build_model(job["shape"]), torch.randn(job["batch"], 3, 224, 224)
    return lambda: model(images), {}


def compile_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import torch._inductor.config as inductor

    inductor.freezing = True
    model, images = build_model(job["shape"]), torch.randn(job["batch"], 3, 224, 224)
    compiled = torch.compile(model)
    return lambda: compiled(images), {}


def onnxruntime_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import onnxruntime

    images = torch.randn(job["batch"], 3, 224, 224)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(str(onnx_file(job)), options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed), {}


def openvino_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import openvino

    images = torch.randn(job["batch"], 3, 224, 224)
    core = openvino.Core()
    model = core.read_model(onnx_file(job))
    config = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    feed = {0: images.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True), {}


def peak_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    """Not a model: the rate of fused multiply-adds that the cores reach with nothing to load."""
    from prunevit_kernels import _cpu

    return lambda: _cpu.fma_peak(job["threads"], 100) / 1e9, {"returns": "gflops"}


BUILD: dict[str, Callable[[dict[str, Any]], tuple[Run, dict[str, Any]]]] = {
    "prunevit": prunevit_peer,
    "eager": eager_peer,
    "torch.compile": compile_peer,
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
    "fma_peak": peak_peer,
}


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    run, facts = BUILD[job["impl"]](job)
    for _ in range(3):
        run()
    print(json.dumps({"built": job["impl"], **facts}), flush=True)
    for line in sys.stdin:
        until, times = time.perf_counter() + float(line), list[float]()
        if facts.get("returns") == "gflops":
            times = [float(run())]  # type: ignore[arg-type]
        while not times or (time.perf_counter() < until and "returns" not in facts):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        # the first call after a pause finds cold caches and a sleeping pool: that is not what is compared
        warm = times[1:] if len(times) > 3 else times
        print(json.dumps({"ms": warm, "p50": statistics.median(warm)}), flush=True)


if __name__ == "__main__":
    main()
