"""The runtime computes what the module computes, on every backend of this machine, and says no by name."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from prunevit.errors import InputError
from prunevit.runtime import Runtime
from prunevit.runtime.plan import make_plan
from prunevit_kernels import Target
from tests.accuracy import error, held_to_eager
from tests.specs import SPECS, block, random_images, random_model, vit

BACKENDS = ["torch", "cpu"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SPECS)
def test_computes_what_the_module_computes(name: str, backend: str) -> None:
    spec = SPECS[name]
    model, images = random_model(spec), random_images(spec)
    got = Runtime(model, device="cpu", backend=backend)(images)
    # folding rounds too: a few units in the last place of the largest logit
    held_to_eager(model, images, got, torch.float32, units=16)


def test_runs_in_fp64_on_the_reference_ops() -> None:
    spec = SPECS["every_head_its_own_width"]
    model, images = random_model(spec).double(), random_images(spec)
    got = Runtime(model, device="cpu", dtype=torch.float64)(images.double())
    assert got.dtype == torch.float64
    assert error(got, model(images.double()).detach()) < 1e-6  # weights are rounded to fp32 once


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_sizes_share_weights_and_do_not_disturb_each_other(backend: str) -> None:
    spec = SPECS["evit"]
    runtime = Runtime(random_model(spec), device="cpu", backend=backend, max_programs=2)
    images = random_images(spec, batch=5)
    whole = runtime(images)
    for size in (1, 2, 3, 5, 1):
        torch.testing.assert_close(runtime(images[:size]), whole[:size], rtol=1e-5, atol=1e-5)
    assert len(runtime._engine.programs) == 2
    assert len(runtime._engine.packed) == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["uniform", "attention_pool"])
def test_autocast_does_not_reach_the_runtime(name: str, backend: str) -> None:
    spec = SPECS[name]
    runtime, images = Runtime(random_model(spec), device="cpu", backend=backend), random_images(spec)
    want = runtime(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(runtime(images), want)
        assert torch.equal(runtime.warmup(3)(images), want)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_belong_to_the_caller(backend: str) -> None:
    spec = SPECS["uniform"]
    runtime = Runtime(random_model(spec), device="cpu", backend=backend)
    images = random_images(spec)
    first = runtime(images)
    kept = first.clone()
    runtime(images * 2)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_may_call_one_runtime(backend: str) -> None:
    spec = SPECS["cp_vit_cascade"]
    runtime = Runtime(random_model(spec), device="cpu", backend=backend)
    inputs = [random_images(spec, batch=1 + i % 3, seed=i) for i in range(12)]
    want = [runtime(images) for images in inputs]
    with ThreadPoolExecutor(4) as callers:
        got = list(callers.map(runtime, inputs))
    for output, expected in zip(got, want, strict=True):
        torch.testing.assert_close(output, expected)


@pytest.mark.parametrize("name", ["uniform", "attention_pool"])
@pytest.mark.parametrize("called_before", [True, False], ids=["called_before", "first_called_after"])
def test_training_the_model_further_does_not_reach_the_runtime(name: str, called_before: bool) -> None:
    spec = SPECS[name].replace(dynamic_img_size=True)
    model, images = random_model(spec), random_images(spec)
    larger = torch.nn.functional.pad(images, (0, 4))  # a size that the runtime has planned nothing for
    with torch.no_grad():
        before = [model(images), model(larger)]
    runtime = Runtime(model, device="cpu")
    if called_before:
        runtime(images)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(runtime(images), before[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(runtime(larger), before[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(12, 16), (20, 8), (32, 32)])
@pytest.mark.parametrize("pad", [False, True], ids=["whole_patches", "padded"])
def test_other_image_sizes_where_the_spec_allows_them(size: tuple[int, int], pad: bool) -> None:
    spec = vit(block(), block(), dynamic_img_size=True, dynamic_img_pad=pad)
    model = random_model(spec)
    height, width = (size[0] - 1, size[1] - 2) if pad else size
    images = torch.randn(2, 3, height, width) + 3
    assert error(Runtime(model, device="cpu")(images), model(images).detach()) < 1e-4


def tensors_of(op: Any) -> dict[str, torch.Tensor]:
    return {f.name: getattr(op, f.name) for f in fields(op) if isinstance(getattr(op, f.name), torch.Tensor)}


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name].selection is None])
def test_another_image_size_folds_the_stem_alone(name: str) -> None:
    spec = SPECS[name]
    tensors, target = random_model(spec).state_dict(), Target("torch")
    size = (spec.img_size[0] + spec.patch_size[0], spec.img_size[1])
    full, lean = (make_plan(spec, tensors, target, size, alone) for alone in (False, True))
    assert [(s.name, s.views, s.macs) for s in lean.steps] == [(s.name, s.views, s.macs) for s in full.steps]
    stem, *others = ((tensors_of(a.op), tensors_of(b.op)) for a, b in zip(lean.steps, full.steps))
    assert all(torch.equal(got, stem[1][key]) for key, got in stem[0].items())
    for got, want in others:
        assert {k: (v.shape, v.device.type) for k, v in got.items()} == {k: (v.shape, "meta") for k, v in want.items()}


def test_a_timm_model_runs_as_it_is() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32) + 3
    assert error(Runtime(model, device="cpu")(images), model(images).detach()) < 1e-4


def test_only_the_rows_that_are_read_are_computed() -> None:
    spec = SPECS["uniform"]
    plan = make_plan(spec, random_model(spec).state_dict(), Target("torch"))
    n, last = spec.num_patches + 1, spec.blocks[-1]
    rows_saved = (n - 1) * (last.v_dim * spec.embed_dim + 2 * last.mlp_dim * spec.embed_dim)
    pairs_saved = (n - 1) * n * (sum(last.qk_dims) + last.v_dim)
    assert plan.macs == spec.macs() - rows_saved - pairs_saved


def test_a_plan_of_all_rows_counts_what_the_spec_counts() -> None:
    spec = SPECS["average_pool_final_norm"]
    plan = make_plan(spec, random_model(spec).state_dict(), Target("torch"))
    assert plan.macs == spec.macs()


GOOD = random_images(SPECS["uniform"])
WRONG_INPUTS = {
    "not_a_tensor": (np.zeros((1, 3, 12, 16), np.float32), r"images as a tensor.*got ndarray"),
    "no_batch": (GOOD[0], r"images \[B, C, H, W\], got shape \(3, 12, 16\)"),
    "empty_batch": (GOOD[:0], r"at least one image, got shape \(0, 3, 12, 16\)"),
    "channels": (GOOD[:, :1].contiguous(), r"expected 3 channels, got 1"),
    "size": (GOOD[..., :8].contiguous(), r"images of 12 × 16 pixels, got \(12, 8\)"),
    "dtype": (GOOD.double(), r"expected float32 images, got torch.float64"),
    "integers": ((GOOD * 9).to(torch.uint8), r"expected float32 images, got torch.uint8"),
    "nan": (GOOD.clone().index_fill_(0, torch.tensor([1]), float("nan")), r"finite pixel values, got NaN"),
    "infinity": (GOOD.clone().index_fill_(0, torch.tensor([1]), float("inf")), r"finite pixel values, got NaN or inf"),
    "device": (GOOD.to("meta"), r"images on cpu .*got meta"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_a_wrong_input_is_refused_by_name(name: str) -> None:
    images, message = WRONG_INPUTS[name]
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu")
    with pytest.raises(InputError, match=message):
        runtime(images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_of_any_layout_are_taken(backend: str) -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu", backend=backend)
    want, one = runtime(GOOD), runtime(GOOD[:1])
    for images in (
        GOOD.to(memory_format=torch.channels_last),
        GOOD.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        GOOD.repeat(1, 1, 1, 2)[..., :16],
    ):
        assert not images.is_contiguous()
        assert torch.equal(runtime(images), want)
    torch.testing.assert_close(runtime(GOOD[:1].expand(3, -1, -1, -1)), one.expand(3, -1))


def test_nan_checks_can_be_turned_off() -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu", check_nan=False)
    assert runtime(torch.full_like(GOOD, float("nan"))).isnan().all()


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="an NVIDIA GPU for device cuda"):
        Runtime(random_model(SPECS["uniform"]), device="cuda")


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_is_an_error(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads to be a whole number of at least 1, got {threads}"):
        Runtime(random_model(SPECS["uniform"]), device="cpu", threads=threads)


WRONG_OPTIONS = {
    "programs": ({"max_programs": 0}, "max_programs to be a whole number of at least 1, got 0"),
    "too_many_threads": ({"backend": "cpu", "threads": 100_000}, "expected 1 to 1024 threads, got 100000"),
    "programs_in_words": ({"max_programs": "3"}, "max_programs to be a whole number of at least 1, got '3'"),
    "threads_in_words": ({"threads": "2"}, "threads to be a whole number of at least 1, got '2'"),
    "dtype_in_words": ({"dtype": "fp32"}, "a floating torch.dtype such as torch.float32, got fp32"),
    "integers": ({"dtype": torch.int8}, "a floating torch.dtype such as torch.float32, got torch.int8"),
    "dtype_of_the_cpu_backend": ({"backend": "cpu", "dtype": torch.float16}, "the cpu backend in fp32, got torch.fl"),
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_a_wrong_option_is_refused_by_name(name: str) -> None:
    options, message = WRONG_OPTIONS[name]
    with pytest.raises(InputError, match=message):
        Runtime(random_model(SPECS["uniform"]), device="cpu", **options)


@pytest.mark.parametrize("batch", [0, 1.5, [1, 0], [2.5], [2, True], True, "3", [None]])
def test_warmup_refuses_what_is_no_batch(batch: object) -> None:
    with pytest.raises(InputError, match="a batch to be a whole number of at least 1"):
        Runtime(random_model(SPECS["uniform"]), device="cpu").warmup(batch)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [32, (32,), (12, 16, 3), "ab", (12.0, 16), (True, True), (0, 16)])
def test_what_is_no_image_size_is_refused_by_name(size: Any) -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu")
    for call in (runtime.plan, lambda size: runtime.warmup(1, size), lambda size: runtime.explain(1, 1, size)):
        with pytest.raises(InputError, match=r"img_size as two whole numbers of pixels, \(height, width\), got"):
            call(size)


def test_counts_of_numpy_are_counts() -> None:
    one, two = np.int64(1), np.int32(2)
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu", threads=one, max_programs=two)
    assert set(runtime.warmup([one, two]).warmup(two, [12, 16])._engine.programs) == {(1, 12, 16), (2, 12, 16)}
    assert '"batch": 2' in runtime.explain(two, one, (np.int64(12), np.int64(16))).to_json()
    with pytest.raises(InputError, match=r"threads to be a whole number of at least 1, got np\.float64\(2\.0\)"):
        Runtime(random_model(SPECS["uniform"]), device="cpu", threads=np.float64(2))


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    script = "import prunevit\nfrom tests.specs import SPECS, random_model\n"
    script += "try: prunevit.Runtime(random_model(SPECS['uniform']), device='cpu', backend='cpu')\n"
    script += "except prunevit.errors.InputError as error: print(error)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PRUNEVIT_CPU_ISA": "mmx"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert "expected PRUNEVIT_CPU_ISA to be one of" in done.stdout


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runtime_goes_with_its_last_name(backend: str) -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu", backend=backend)
    runtime(GOOD)
    gone = weakref.ref(runtime), weakref.ref(runtime._engine)
    gc.disable()
    try:
        del runtime
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["copy", "pickle"])
@pytest.mark.parametrize("name", ["evit", "attention_pool"])
def test_a_copy_computes_the_same_on_threads_of_its_own(name: str, copied: Callable[[Runtime], Runtime]) -> None:
    runtime, images = Runtime(random_model(SPECS[name]), device="cpu"), random_images(SPECS[name])
    want = runtime(images)
    other = copied(runtime)
    del runtime
    assert torch.equal(other(images), want)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_child_runs_though_another_thread_of_its_parent_was_at_it() -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu", threads=2)
    want = runtime(GOOD)
    with runtime._engine.turn():  # as a call on another thread would be
        child = os.fork()
        if not child:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # pytest's own would let the child go on with the tests
            signal.alarm(20)
            try:
                os._exit(0 if torch.equal(runtime(GOOD), want) else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(runtime(GOOD), want)


def test_a_missing_extension_is_a_warning_with_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunevit.runtime.backend.cpu_extension_built", lambda: False)
    with pytest.warns(RuntimeWarning, match="setup.py build_ext --inplace"):
        runtime = Runtime(random_model(SPECS["uniform"]), device="cpu")
    assert runtime.backend == "torch"


def test_a_missing_extension_that_was_asked_for_is_an_error_with_that_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prunevit_kernels._cpu", None)
    with pytest.raises(InputError, match=r"kernels for backend cpu, got none built: .*setup\.py build_ext --inplace"):
        Runtime(random_model(SPECS["uniform"]), backend="cpu")


def test_predict_reads_paths_and_pictures_and_names_classes(tmp_path: object) -> None:
    spec = vit(block(), img_size=(32, 32), num_classes=1000, embed_dim=16)
    runtime = Runtime(random_model(spec), device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    path = f"{tmp_path}/photo.png"
    picture.save(path)
    (from_path,), (from_picture,) = runtime.predict(path, top_k=3), runtime.predict([picture.convert("RGBA")], top_k=3)
    assert from_path == from_picture
    assert len(from_path) == 3
    assert from_path[0].probability >= from_path[1].probability
    assert "class" not in from_path[0].label  # ImageNet's own names


LABELS: dict[str, tuple[dict[str, object], str]] = {
    "list": ({"label_names": [f"n{i}" for i in range(7)]}, "n3"),
    "by_index": ({"label_names": {str(i): f"n{i}" for i in reversed(range(7))}}, "n3"),
    "described": ({"label_names": [f"n{i}" for i in range(7)], "label_descriptions": {"n3": "a cat"}}, "a cat"),
    "not_by_index": ({"label_names": {f"n{i}": str(i) for i in range(7)}}, "class 3"),
}


@pytest.mark.parametrize("case", LABELS)
def test_predict_reads_labels_as_timm_has_them(case: str) -> None:
    model, want = random_model(SPECS["uniform"]), LABELS[case][1]
    model.pretrained_cfg = LABELS[case][0]
    best = Runtime(model, device="cpu").predict(Image.new("RGB", (40, 40)), top_k=7)[0]
    assert [p.label for p in best if p.index == 3] == [want]


@pytest.mark.parametrize("kind", ["png", "ppm"])
def test_predict_names_a_picture_that_is_broken(kind: str, tmp_path: Path) -> None:
    picture, path = Image.effect_noise((300, 300), 99).convert("RGB"), tmp_path / f"broken.{kind}"
    picture.save(path)
    data = bytearray(path.read_bytes())
    if kind == "png":
        second = data.find(b"IDAT", data.find(b"IDAT") + 4)
        data[second : second + 4] = b"\0\1\2\3"
    else:
        data[3:6] = b"3x0"  # of its width
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"an image that Pillow reads, got .*broken.{kind}"):
        Runtime(random_model(SPECS["uniform"]), device="cpu").predict(path)


def test_predict_in_one_channel_takes_the_mean_of_three() -> None:
    timm_model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4, in_chans=1)
    assert len(timm_model.pretrained_cfg["mean"]) == 3
    runtime = Runtime(timm_model, device="cpu")
    ((best,),) = runtime.predict(Image.new("RGB", (40, 40), "white"), top_k=1)
    assert best.label.startswith("class ")


def test_predict_refuses_a_config_that_timm_does_not_know() -> None:
    model = random_model(SPECS["uniform"])
    model.pretrained_cfg = {"interpolation": "bogus"}
    runtime = Runtime(model, device="cpu")
    with pytest.raises(InputError, match=r"that timm can prepare images by, got KeyError.*bogus"):
        runtime.predict(Image.new("RGB", (40, 40)))


@pytest.mark.parametrize("count", [1, 5, 7])
def test_predict_runs_in_batches(count: int) -> None:
    runtime = Runtime(random_model(vit(block(), img_size=(8, 8))), device="cpu")
    pictures = [
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (9, 9, 3), dtype=np.uint8)) for i in range(count)
    ]
    got = runtime.predict(pictures, batch_size=3)
    assert [[p.index for p in top] for top in got] == [
        [p.index for p in runtime.predict(picture)[0]] for picture in pictures
    ]
    assert {shape[0] for shape in runtime._engine.programs} <= {1, 2, 3}
    with pytest.raises(InputError, match="batch_size to be a whole number of at least 1, got 0"):
        runtime.predict(pictures, batch_size=0)


def test_predict_refuses_what_is_no_image(tmp_path: object) -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu")
    path = f"{tmp_path}/notes.txt"
    with open(path, "w") as file:
        file.write("no image")
    with pytest.raises(InputError, match="an image that Pillow reads"):
        runtime.predict(path)
    with pytest.raises(InputError, match="which is no file"):
        runtime.predict(f"{tmp_path}/missing.png")
    with pytest.raises(InputError, match="at least one image"):
        runtime.predict([])
    for what in (5, None):
        with pytest.raises(InputError, match="paths or PIL images"):
            runtime.predict(what)  # type: ignore[arg-type]


def test_warmup_prepares_a_batch_size() -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu").warmup(4)
    assert (4, 12, 16) in runtime._engine.programs
