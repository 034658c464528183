"""What ``save`` writes and what it refuses, and by which name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

import prunevit
from prunevit import pruning
from prunevit.cli import prune as command_line
from prunevit.errors import CheckpointError, InputError, PrunevitError, RuntimeMismatch
from prunevit.runtime import plan
from tests.specs import SPECS, random_images, random_model, vit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_any_floating_dtype_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    model = random_model(SPECS["every_head_its_own_width"]).to(dtype)
    model.train()
    loaded = prunevit.load(prunevit.save(model, tmp_path / "saved"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert model.training
    assert {p.dtype for p in model.parameters()} == {dtype}


def _mix(model: Any) -> Any:
    model.norm.double()
    return model


def _spoil(model: Any) -> Any:
    model.norm.weight.data[0] = float("nan")
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], type[PrunevitError], str]] = {
    "mixed_dtypes": (_mix, CheckpointError, r"norm\.weight: expected one of F64.* the same for all, got torch.float64"),
    "nan": (_spoil, CheckpointError, r"norm\.weight: expected finite weights"),
    "a_timm_model": (
        lambda _: timm.create_model("vit_tiny_patch16_224", depth=1),
        InputError,
        r"expected a PrunedViT \(prunevit\.from_timm makes one\), got VisionTransformer",
    ),
    "nothing": (lambda _: None, InputError, "expected a PrunedViT .* got NoneType"),
}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_no_checkpoint_holds_is_refused_by_name(case: str, check: bool, tmp_path: Path) -> None:
    change, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        prunevit.save(change(random_model(SPECS["uniform"])), tmp_path / "saved", check=check)
    assert not (tmp_path / "saved").exists()


def test_tied_weights_are_written_as_two(tmp_path: Path) -> None:
    model: Any = random_model(SPECS["distilled"])
    model.head_dist.weight = model.head.weight
    loaded = prunevit.load(prunevit.save(model, tmp_path / "saved"))
    images = random_images(model.spec)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_another_default_dtype_is_no_obstacle(tmp_path: Path) -> None:
    model = random_model(SPECS["average_pool_fc_norm"])
    runtime = prunevit.Runtime(model, device="cpu")
    torch.set_default_dtype(torch.float64)
    try:
        prunevit.save(model, tmp_path / "saved")
        runtime.warmup(2).explain(rounds=1)
        picture = prunevit.Runtime(random_model(vit(img_size=(8, 8))).float(), device="cpu")
        from PIL import Image

        assert len(picture.predict(Image.new("RGB", (9, 9)))[0]) == 5
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("accelerated", [False, True])
def test_a_runtime_that_is_wrong_is_caught(accelerated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On kernels a model runs by the same plan: it is the eager one that counts."""
    right = plan.mlp_op

    def wrong(*args: Any) -> Any:
        op = right(*args)
        return dataclasses.replace(op, w2=op.w2 * 1.5)

    model = random_model(SPECS["uniform"])
    model = prunevit.accelerate(model) if accelerated else model
    kinds = [type(module) for module in model.modules()]
    prunevit.save(model, tmp_path / "right")
    monkeypatch.setattr(plan, "mlp_op", wrong)
    with pytest.raises(RuntimeMismatch, match="nothing was written"):
        prunevit.save(model, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()
    assert [type(module) for module in model.modules()] == kinds


def test_a_model_that_diverged_is_not_blamed_on_the_runtime(tmp_path: Path) -> None:
    model = random_model(SPECS["uniform"])
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight.fill_(1e20)
        model.blocks[0].mlp.fc2.weight.fill_(1e20)
    with pytest.raises(CheckpointError, match=r"outputs on random images are numbers .* got infinities or NaN"):
        prunevit.save(model, tmp_path / "diverged")
    assert not (tmp_path / "diverged").exists()
    prunevit.save(model, tmp_path / "diverged", check=False)


def test_another_default_device_is_no_obstacle(tmp_path: Path) -> None:
    model, images = random_model(SPECS["average_pool_fc_norm"]), random_images(SPECS["average_pool_fc_norm"])
    want = prunevit.Runtime(model, device="cpu")(images)
    with torch.device("meta"):
        prunevit.save(model, tmp_path / "saved")
        assert torch.equal(prunevit.Runtime(model, device="cpu")(images), want)


def test_one_default_method() -> None:
    """On the command line too, which says it without importing what would load torch."""
    facade, inner, typed = (
        inspect.signature(f).parameters["method"].default for f in (prunevit.prune, pruning.prune, command_line.command)
    )
    assert facade == inner == "snp"
    assert typed == [facade]
