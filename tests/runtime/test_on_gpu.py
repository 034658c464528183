"""Whole models on a GPU: against fp64, as graphs, from several threads and streams, and what a graph must not do."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import Tensor

from prunevit import PrunedViT, shapes
from prunevit.errors import InputError
from prunevit.runtime import Runtime
from tests.accuracy import held_to_eager
from tests.specs import SPECS, random_images, random_model

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# in 16 bits near-ties select differently: those specs are held to themselves, not to fp64
EXACT = [name for name, spec in SPECS.items() if all(block.select is None for block in spec.blocks)]
PUBLISHED = ["snp_deit_tiny", "snp_deit_small_1g3", "ragged_deit_small", "savit_deit_base"]


@pytest.fixture(autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "tests marked gpu need an NVIDIA GPU that PyTorch sees"


def images_of(name: str, batch: int = 3, seed: int = 1) -> Tensor:
    return random_images(SPECS[name], batch, seed).cuda()


@DTYPES
@pytest.mark.parametrize("name", EXACT)
def test_computes_what_the_module_computes(name: str, dtype: torch.dtype) -> None:
    model, images = random_model(SPECS[name]).to(dtype).float(), images_of(name)
    runtime = Runtime(model, dtype=dtype)
    outputs = [runtime(images) for _ in range(3)]  # step by step, recorded, replayed
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    held_to_eager(model, images, outputs[0], dtype)


@pytest.mark.parametrize("name", SPECS)
def test_launches_that_overlap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that begin while the one ahead still runs compute the same."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches overlap from sm_90 on")
    images = images_of(name)
    want = Runtime(random_model(SPECS[name])).warmup(3)(images)
    monkeypatch.setenv("PRUNEVIT_PDL", "1")
    overlapping = Runtime(random_model(SPECS[name])).warmup(3)
    for _ in range(20):
        assert torch.equal(overlapping(images), want)


@DTYPES
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = PrunedViT(shapes.get(name)).eval().to(dtype).float()
    images = torch.randn(batch, 3, 224, 224, device="cuda")
    runtime = Runtime(model, dtype=dtype).warmup(batch)
    held_to_eager(model, images, runtime(images), dtype)


def test_the_call_of_a_published_model_takes_as_long_as_its_steps() -> None:
    it = Runtime(PrunedViT(shapes.get("snp_deit_small"))).warmup(64).explain(64)
    steps = sum(step.ms for step in it.steps)
    assert 0.6 * steps < it.call_ms < 1.4 * steps


@pytest.mark.parametrize("name", SPECS)
def test_a_graph_computes_what_its_steps_compute(name: str) -> None:
    steps = Runtime(random_model(SPECS[name]), cuda_graphs=False)
    graphs = Runtime(random_model(SPECS[name])).warmup(3)
    for seed in range(5):
        images = images_of(name, seed=seed)
        assert torch.equal(graphs(images), steps(images))


@pytest.mark.parametrize("name", ["uniform", "embed_norm", "image_with_a_remainder"])
def test_many_images_are_read_where_they_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a first step outside of the graph; those that do not start on 16 bytes are copied."""
    few = Runtime(random_model(SPECS[name])).warmup(3)
    monkeypatch.setattr("prunevit.runtime.engine.COPIED_BYTES", 0)
    many = Runtime(random_model(SPECS[name])).warmup(3)
    for seed in range(4):
        images = images_of(name, seed=seed).bfloat16()
        shifted = torch.empty(images.numel() + 1, dtype=images.dtype, device=images.device)[1:].view(images.shape)
        shifted.copy_(images)
        want = few(images)
        assert torch.equal(many(images), want)
        assert torch.equal(many(shifted), want)


def test_nothing_is_left_of_a_call_with_nan() -> None:
    for name in SPECS:
        runtime, images = Runtime(random_model(SPECS[name])), images_of(name)
        before = runtime(images)
        for _ in range(3):
            runtime(torch.full_like(images, float("nan")))
        assert torch.equal(runtime(images), before), name


def test_nan_is_refused_where_it_is_looked_for() -> None:
    runtime, images = Runtime(random_model(SPECS["uniform"]), check_nan=True), images_of("uniform")
    runtime(images)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="finite pixel values"):
        runtime(images)


@pytest.mark.parametrize("name", ["uniform", "attention_pool"])
def test_recorded_in_another_thread_than_it_began_in(name: str) -> None:
    """Libraries keep a handle for each thread, which they may not make while a graph is recorded."""
    runtime, images = Runtime(random_model(SPECS[name])), images_of(name)
    got = [runtime(images)]
    torch.cuda.synchronize()

    def work() -> None:
        got.extend(runtime(images) for _ in range(2))
        torch.cuda.synchronize()

    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert len(got) == 3
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_graphs_are_recorded_on_a_stream_that_nobody_else_gets() -> None:
    """PyTorch's streams are a few that take turns. Who comes after a runtime gets its stream."""
    runtimes = [Runtime(random_model(SPECS["uniform"])).warmup(1) for _ in range(2)]
    own = [runtime._engine.recorder._stream.cuda_stream for runtime in runtimes]  # type: ignore[attr-defined]
    streams = [torch.cuda.Stream().cuda_stream for _ in range(100)]
    assert len(set(streams)) < 100
    assert len({*own, *streams}) == len(set(streams)) + 2
    del runtimes[0]
    assert Runtime(random_model(SPECS["uniform"]))._engine.recorder._stream.cuda_stream == own[0]  # type: ignore[attr-defined]


def test_concurrent_threads_on_streams_of_their_own() -> None:
    """Each output as when its caller had the GPU to itself; two runtimes, which record at the same time."""
    name, several = "cp_vit_cascade", [images_of("cp_vit_cascade", 1 + i % 4, seed=i) for i in range(32)]
    runtimes = [Runtime(random_model(SPECS[name], seed=seed)) for seed in (0, 1)]
    want = [Runtime(random_model(SPECS[name], seed=i % 2), cuda_graphs=False)(x) for i, x in enumerate(several)]
    got: dict[int, Tensor] = {}
    failed: list[BaseException] = []
    torch.cuda.synchronize()

    def work(worker: int) -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                for _ in range(8):
                    for i in range(worker, len(several), 4):
                        got[i] = runtimes[i % 2](several[i])
            stream.synchronize()
        except BaseException as reason:
            failed.append(reason)
            raise

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert all(torch.equal(got[i], output) for i, output in enumerate(want))


def test_outputs_belong_to_the_caller() -> None:
    runtime = Runtime(random_model(SPECS["uniform"])).warmup(3)
    first = runtime(images_of("uniform", seed=1))
    kept = first.clone()
    for seed in range(2, 6):
        runtime(images_of("uniform", seed=seed))
    assert torch.equal(first, kept)


def test_graphs_come_and_go_while_others_run() -> None:
    name = "evit"
    runtime = Runtime(random_model(SPECS[name]), max_programs=2)
    want = {
        batch: Runtime(random_model(SPECS[name]), cuda_graphs=False)(images_of(name, batch)) for batch in range(1, 6)
    }
    for _ in range(4):
        for batch in (1, 1, 5, 5, 2, 2, 3, 4, 4):
            assert torch.equal(runtime(images_of(name, batch)), want[batch])
    assert len(runtime._engine.programs) == 2


def test_a_replay_allocates_its_output_alone() -> None:
    runtime = Runtime(random_model(SPECS["uniform"])).warmup([1, 4])
    images = images_of("uniform", 4).bfloat16()  # others are cast first
    runtime(images)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    output = runtime(images)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before + 1
    assert output.shape[0] == 4


def test_a_warm_runtime_compiles_nothing_in_a_request() -> None:
    runtime = Runtime(random_model(SPECS["uniform"])).warmup([1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runtime(images_of("uniform", 1))
        runtime(images_of("uniform", 2))


def test_somebody_elses_capture_is_refused() -> None:
    runtime, images = Runtime(random_model(SPECS["uniform"])).warmup(3), images_of("uniform")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(InputError, match="no CUDA graph capture"), torch.cuda.graph(graph):
        runtime(images)
    torch.cuda.synchronize()
    runtime(images)


def test_fp32_images_are_cast() -> None:
    runtime, images = Runtime(random_model(SPECS["uniform"]), dtype=torch.float16), images_of("uniform")
    assert torch.equal(runtime(images), runtime(images.half()))
