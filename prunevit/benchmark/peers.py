"""What can run a model on a CPU, each built as its users build it. Run as a process by ``interleaved.py``.

Reads one job as JSON from the command line, answers one line when built, then one line of times for each line of
seconds on standard input. A job names its model by ``checkpoint`` (a directory), ``shape`` (a published one) or
``spec`` (random weights), and has a ``batch``, ``threads``, the ``impl`` and for some of them an ``onnx`` file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import checkpoint, shapes
from ..models.vit import PrunedViT
from ..runtime import Runtime
from ..spec import ViTSpec
from .interleaved import serve, timed

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
    return f"{', '.join(absent)} not installed: pip install 'prunevit[bench]'" if absent else None


def spec_of(job: dict[str, Any]) -> ViTSpec:
    """The shape that a job runs."""
    if "checkpoint" in job:
        return checkpoint.read_config(job["checkpoint"]).spec
    return shapes.get(job["shape"]) if "shape" in job else ViTSpec.from_dict(job["spec"])


def build_model(job: dict[str, Any]) -> PrunedViT:
    """A checkpoint's model, or a shape with random weights, of which every peer gets the same."""
    if "checkpoint" in job:
        return checkpoint.load(job["checkpoint"]).eval()
    torch.manual_seed(0)
    return PrunedViT(spec_of(job)).eval()


def images_of(job: dict[str, Any]) -> Tensor:
    """A batch of the job's size."""
    spec = spec_of(job)
    return torch.randn(job["batch"], spec.in_chans, *spec.img_size)


def prunevit_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    model, images = build_model(job), images_of(job)
    runtime = Runtime(model, device="cpu", dtype=torch.float32, threads=job["threads"])
    runtime(images)
    return lambda: runtime(images), {"executed_macs": runtime.plan().macs}


def eager_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    model, images = build_model(job), images_of(job)
    return lambda: model(images), {}


def compile_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import torch._inductor.config as inductor

    inductor.freezing = True
    model, images = build_model(job), images_of(job)
    compiled = torch.compile(model)
    return lambda: compiled(images), {}


def onnxruntime_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import onnxruntime

    images = images_of(job)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    session = onnxruntime.InferenceSession(job["onnx"], options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed), {}


def openvino_peer(job: dict[str, Any]) -> tuple[Run, dict[str, Any]]:
    import openvino

    images = images_of(job)
    core = openvino.Core()
    model = core.read_model(job["onnx"])
    config = {"INFERENCE_NUM_THREADS": job["threads"], "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", config).create_infer_request()
    feed = {0: images.numpy()}
    return lambda: request.infer(feed, share_inputs=True, share_outputs=True), {}


BUILD: dict[str, Callable[[dict[str, Any]], tuple[Run, dict[str, Any]]]] = {
    "prunevit": prunevit_peer,
    "eager": eager_peer,
    "torch.compile": compile_peer,
    "onnxruntime": onnxruntime_peer,
    "openvino": openvino_peer,
}


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if job["impl"] == "fma_peak":  # not a model: GFLOP/s that the cores reach with nothing to load
        from prunevit_kernels.cpu import extension

        serve(lambda _: [extension().fma_peak(job["threads"], 100) / 1e9])
        return
    run, facts = BUILD[job["impl"]](job)
    for _ in range(3):
        run()
    serve(partial(timed, run), **facts)


if __name__ == "__main__":
    main()
