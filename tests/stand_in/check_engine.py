"""The engine between streams: run by test_stand_in.py, in a process of the stand-in."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from prunevit.runtime import Runtime
from prunevit.runtime.graphs import OnStreams
from prunevit_kernels._configs import MLP_KERNELS
from prunevit_kernels.fused_mlp._cuda import KERNEL_VARIABLE
from tests.accuracy import held_to_eager
from tests.specs import SPECS, random_images, random_model

from .device import DRAWN

pytestmark = pytest.mark.gpu  # chosen by name where there is a stand-in, and nowhere else

NAME = "every_head_its_own_width"


def outputs(runtime: Runtime, several: list[Tensor]) -> list[Tensor]:
    """Each on a stream of its own, and none waited for before all have been asked for."""
    streams, got = [torch.cuda.Stream() for _ in several], []
    torch.cuda.synchronize()
    for images, stream in zip(several, streams):
        with torch.cuda.stream(stream):
            got.append(runtime(images))
    torch.cuda.synchronize()
    return got


@pytest.mark.parametrize("kernel", MLP_KERNELS)
def test_a_whole_model_by_every_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    model, images = random_model(SPECS[NAME]).bfloat16().float(), random_images(SPECS[NAME], 2).cuda()
    runtime = Runtime(model)
    outputs = [runtime(images) for _ in range(3)]  # step by step, recorded, replayed
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])
    held_to_eager(model, images, outputs[0], torch.bfloat16)


@pytest.mark.parametrize("waits", [True, False])
def test_calls_on_several_streams_take_turns(waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(random_model(SPECS[NAME])).warmup(2)
    several = [random_images(SPECS[NAME], 2, seed).cuda() for seed in range(4)]
    want = [runtime(images).cpu() for images in several]

    @contextmanager
    def no_turn(self: OnStreams) -> Iterator[None]:
        yield

    if not waits:
        monkeypatch.setattr(OnStreams, "turn", no_turn)
    right = [
        torch.equal(got.cpu(), wanted)
        for _ in range(3 if waits else 10)
        for got, wanted in zip(outputs(runtime, several), want)
    ]
    assert all(right) or not waits
    if DRAWN and not waits:
        assert not all(right), "an engine without turns goes unnoticed: this test shows nothing"


def test_threads_on_streams_of_their_own() -> None:
    runtime = Runtime(random_model(SPECS[NAME]))
    several = [random_images(SPECS[NAME], 1 + seed % 2, seed).cuda() for seed in range(6)]
    want = [Runtime(random_model(SPECS[NAME]), cuda_graphs=False)(images).cpu() for images in several]
    torch.cuda.synchronize()

    def work(worker: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return [runtime(images).cpu() for images in several[worker::3]]

    with ThreadPoolExecutor(3) as threads:
        got = list(threads.map(work, range(3)))
    assert all(torch.equal(got[i % 3][i // 3], wanted) for i, wanted in enumerate(want))
