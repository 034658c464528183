"""What comes in at the door: a value that is no number is found wherever it is, and nothing is left of it."""

from __future__ import annotations

import pytest
import torch

from prunevit.errors import InputError
from prunevit.runtime import Runtime
from tests.specs import SPECS, block, random_images, random_model, vit

BACKENDS = ["torch", "cpu"]
EVERY = {**SPECS, "class_token_that_attends_to_nothing": vit(block((), ()))}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("name", EVERY)
def test_one_bad_pixel_is_found_wherever_it_is(name: str, value: float, backend: str) -> None:
    spec = EVERY[name]
    images = random_images(spec)
    runtime = Runtime(random_model(spec), device="cpu", backend=backend)
    before = runtime(images)
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(images.numel(), (8,), generator=generator).tolist():
        bad = images.clone()
        bad.view(-1)[at] = value
        with pytest.raises(InputError, match="finite pixel values"):
            runtime(bad)
    assert torch.equal(runtime(images), before)


def test_an_output_that_overflows_is_no_fault_of_the_images() -> None:
    spec = SPECS["uniform"]
    model = random_model(spec)
    with torch.no_grad():
        model.head.bias.fill_(float("inf"))
    assert Runtime(model, device="cpu")(random_images(spec)).isinf().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_in_other_memory_are_read_anew(backend: str) -> None:
    spec = SPECS["uniform"]
    runtime = Runtime(random_model(spec), device="cpu", backend=backend)
    several = [random_images(spec, seed=seed) for seed in range(4)]
    want = [runtime(images) for images in several]
    again = [runtime(images.clone()) for images in several]
    assert all(torch.equal(a, b) for a, b in zip(want, again))
    assert not torch.equal(want[0], want[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_call_in_inference_mode_is_no_obstacle_to_one_outside(backend: str) -> None:
    spec = SPECS["uniform"]
    runtime, images = Runtime(random_model(spec), device="cpu", backend=backend), random_images(spec)
    with torch.inference_mode():
        inside = runtime(images).clone()
    assert torch.equal(runtime(images), inside)
    assert not runtime(images).is_inference()


def test_a_padded_image_may_be_smaller_than_a_patch() -> None:
    model = random_model(vit(block(), dynamic_img_size=True, dynamic_img_pad=True))
    runtime = Runtime(model, device="cpu")
    for size in ((3, 9), (1, 1), (9, 9)):
        images = torch.randn(1, 3, *size) + 3
        with torch.no_grad():
            torch.testing.assert_close(runtime(images), model(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match=r"expected sides of at least one pixel, got \(0, 9\)"):
        runtime(torch.zeros(1, 3, 0, 9))


def test_another_dtype_is_looked_at_again() -> None:
    spec = SPECS["uniform"]
    runtime, images = Runtime(random_model(spec), device="cpu"), random_images(spec)
    runtime(images)
    with pytest.raises(InputError, match="expected float32 images"):
        runtime(images.double())
