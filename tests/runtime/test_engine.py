"""The engine's bookkeeping, with a stand-in for CUDA graphs: who records when, and who shares what memory."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from operator import is_
from typing import Any

import pytest
import torch

from prunevit.errors import InputError
from prunevit.runtime import Runtime, engine
from prunevit.runtime.arena import Arena, Need
from prunevit.runtime.latent_pool import LatentPool
from prunevit_kernels import BackendName, Launch
from prunevit_kernels.cpu import NativeOp
from tests.specs import SPECS, block, random_images, random_model, vit


class Recordings:
    """Records as a device would, and notes what it was asked for."""

    records = True

    def __init__(self) -> None:
        self.recorded = self.replayed = self.settled = 0
        self.inside = False

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert not self.inside, "two callers at once"
        self.inside = True
        time.sleep(0.001)
        try:
            yield
        finally:
            self.inside = False

    def record(self, run: Launch) -> Launch:
        assert self.inside
        self.recorded += 1
        run()  # as CUDA's recorder does

        def replay() -> None:
            self.replayed += 1
            run()

        return replay

    def settle(self) -> None:
        self.settled += 1


def recorded(name: str = "evit", max_programs: int = 8, backend: BackendName = "torch") -> tuple[Runtime, Recordings]:
    runtime = Runtime(random_model(SPECS[name]), device="cpu", backend=backend, max_programs=max_programs)
    recordings = Recordings()
    runtime._engine.recorder = recordings
    return runtime, recordings


def want(name: str, images: torch.Tensor) -> torch.Tensor:
    return Runtime(random_model(SPECS[name]), device="cpu", backend="torch")(images)


@pytest.mark.parametrize("name", SPECS)
def test_step_by_step_recorded_and_replayed_agree(name: str) -> None:
    runtime, recordings = recorded(name)
    several = [random_images(SPECS[name], seed=seed) for seed in range(4)]
    for images in several:
        assert torch.equal(runtime(images), want(name, images))
    assert (recordings.recorded, recordings.replayed) == (1, 3)


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_many_images_are_read_where_they_are(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prunevit_kernels._cpu")
    monkeypatch.setattr(engine, "COPIED_BYTES", most)
    runtime, recordings = recorded(backend="cpu")
    for seed in range(4):
        images = random_images(SPECS["evit"], seed=seed)
        assert torch.allclose(runtime(images), want("evit", images), atol=1e-4)
    (program,) = runtime._engine.programs.values()
    assert (program.images is None) == (most == 0)
    assert (recordings.recorded, recordings.replayed) == (1, 3)


def test_a_shape_that_comes_once_is_not_recorded() -> None:
    runtime, recordings = recorded()
    for batch in (1, 2, 3):
        runtime(random_images(SPECS["evit"], batch))
    assert recordings.recorded == 0
    runtime(random_images(SPECS["evit"], 2))
    assert recordings.recorded == 1


def test_warmup_records_and_no_request_does() -> None:
    runtime, recordings = recorded()
    runtime.warmup([1, 4])
    assert recordings.recorded == 2
    replayed = recordings.replayed
    for batch in (1, 4, 1):
        runtime(random_images(SPECS["evit"], batch))
    assert (recordings.recorded, recordings.replayed) == (2, replayed + 3)


def test_warmup_of_more_batches_than_are_kept_is_refused() -> None:
    runtime, recordings = recorded(max_programs=2)
    with pytest.raises(InputError, match="expected max_programs of at least 3 for as many batches, got 2"):
        runtime.warmup([1, 2, 3])
    assert recordings.recorded == 0


def test_another_image_size_asks_for_the_stem_alone() -> None:
    runtime, asked = Runtime(random_model(SPECS["uniform"].replace(dynamic_img_size=True)), device="cpu"), []
    make_plan = runtime._engine.make_plan
    runtime._engine.make_plan = lambda size, stem_alone: asked.append(stem_alone) or make_plan(size, stem_alone)
    for height in (12, 16, 20):
        runtime.warmup(1, (height, 16))
    assert asked == [False, True, True]


def test_memory_stays_until_the_last_call_has_ended() -> None:
    """Who drops a runtime waits for it: what it still reads and writes would be another's."""
    there: list[bool] = []

    class Noting(Recordings):
        def settle(self) -> None:
            there.append(memory() is not None)

    runtime, _ = recorded()
    one = engine.Engine(runtime._engine.make_plan, runtime.target, recorder=Noting())
    one(random_images(SPECS["evit"]))
    (program,) = one.programs.values()
    memory = weakref.ref(program.out)
    del one, program
    assert there == [True]
    assert memory() is None


def test_the_least_recently_used_shape_goes_and_nothing_in_flight_is_freed() -> None:
    runtime, recordings = recorded(max_programs=2)
    for batch in (1, 2, 1):
        runtime(random_images(SPECS["evit"], batch))
    assert recordings.settled == 0
    runtime(random_images(SPECS["evit"], 3))
    assert [key[0] for key in runtime._engine.programs] == [1, 3]
    assert recordings.settled == 1
    images = random_images(SPECS["evit"], 2)
    assert torch.equal(runtime(images), want("evit", images))
    assert len(runtime._engine.programs) == 2


def storages(runtime: Runtime) -> list[set[int]]:
    return [{t.untyped_storage().data_ptr() for t in p.storage.values()} for p in runtime._engine.programs.values()]


def test_smaller_batches_share_the_largest_ones_memory() -> None:
    runtime, _ = recorded()
    runtime.warmup([1, 2, 5])
    assert len({frozenset(storage) for storage in storages(runtime)}) == 1
    weights = {id(program.packed) for program in runtime._engine.programs.values()}
    assert len(weights) == 1


def test_growing_leaves_what_is_bound_where_it_is() -> None:
    runtime, _ = recorded()
    images = [random_images(SPECS["evit"], batch) for batch in (1, 4, 2)]
    expected = [want("evit", batch) for batch in images]
    for _ in range(3):
        for batch, output in zip(images, expected):
            assert torch.equal(runtime(batch), output)
    first, second, third = storages(runtime)
    assert first.isdisjoint(second)
    assert second == third


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.selection is None])
def test_image_sizes_share_all_weights_but_the_stems(name: str, backend: Any) -> None:
    spec = SPECS[name].replace(dynamic_img_size=True, img_size=(12, 16))
    model = random_model(spec)
    runtime = Runtime(model, device="cpu", backend=backend)
    for size in ((12, 16), (24, 32)):
        images = torch.randn(2, spec.in_chans, *size) + 3
        fresh = Runtime(model, device="cpu", backend=backend)
        assert torch.equal(runtime(images), fresh(images))
    first, second = (packed.ops for packed in runtime._engine.packed.values())
    assert first[0] is not second[0]
    assert all(map(is_, first[1:], second[1:]))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("name", ["emptied_after_layer_scale", "attention_pool"])
def test_what_is_packed_is_all_that_is_kept(name: str, backend: Any) -> None:
    """Of the weights as they were folded nothing stays beside them."""
    runtime = Runtime(random_model(SPECS[name]), device="cpu", backend=backend).warmup()
    (packed,) = runtime._engine.packed.values()
    steps = [step.op for step in packed.plan.steps]
    kept = steps if backend == "torch" else steps + [op.op for op in packed.ops if isinstance(op, NativeOp)]
    for op in kept:
        parts = [*op.pool.parameters(), *op.head.parameters()] if isinstance(op, LatentPool) else vars(op).values()
        assert {part.device.type for part in parts if isinstance(part, torch.Tensor)} <= {"meta"}


def test_image_sizes_share_memory() -> None:
    spec = vit(block(), block(), dynamic_img_size=True)
    runtime = Runtime(random_model(spec), device="cpu", backend="torch", max_programs=1)
    runtime._engine.recorder = Recordings()
    large, small = torch.randn(2, 3, 24, 32) + 3, torch.randn(2, 3, 12, 16) + 3
    alone = [Runtime(random_model(spec), device="cpu", backend="torch")(images) for images in (large, small)]
    for _ in range(2):
        assert torch.equal(runtime(large), alone[0])
        assert torch.equal(runtime(small), alone[1])
    assert list(runtime._engine.packed) == [(12, 16)]


def test_callers_take_turns_and_own_what_they_get() -> None:
    runtime, _ = recorded("cp_vit_cascade")
    inputs = [random_images(SPECS["cp_vit_cascade"], 1 + i % 3, seed=i) for i in range(12)]
    with ThreadPoolExecutor(4) as callers:
        got = list(callers.map(runtime, inputs))
    for images, output in zip(inputs, got, strict=True):
        assert torch.equal(output, want("cp_vit_cascade", images))


def test_a_recording_that_fails_is_tried_again() -> None:
    runtime, recordings = recorded()
    images = random_images(SPECS["evit"])
    runtime(images)

    def broken(run: Launch) -> Launch:
        raise RuntimeError("out of memory")

    recordings.record = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        runtime(images)
    del recordings.record  # type: ignore[method-assign]
    assert torch.equal(runtime(images), want("evit", images))
    assert recordings.recorded == 1


def test_a_request_that_has_to_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "COLD_SECONDS", 0.0)
    runtime, _ = recorded()
    with pytest.warns(RuntimeWarning, match=r"warmup\(3\) beforehand"):
        runtime(random_images(SPECS["evit"], 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(engine, "COLD_SECONDS", 60.0)
        runtime.warmup(2)
        runtime(random_images(SPECS["evit"], 2))


def test_an_arena_gives_the_same_memory_until_it_is_too_small() -> None:
    arena = Arena(torch.device("cpu"))
    large = arena.take({"x": Need(10, torch.float32), "y": Need(4, torch.float32)})
    small = arena.take({"x": Need(3, torch.float32), "y": Need(2, torch.float32)})
    assert [small[name].data_ptr() for name in "xy"] == [large[name].data_ptr() for name in "xy"]
    assert small["x"].shape == (3,)
    wider = arena.take({"x": Need(3, torch.float32), "y": Need(5, torch.float32)})
    assert wider["y"].data_ptr() != large["y"].data_ptr()
    assert arena.take({"x": Need(10, torch.float32)})["x"].data_ptr() == wider["x"].data_ptr()
    assert all(bool((buffer == 0).all()) for buffer in wider.values())
