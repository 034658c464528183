"""The demo's first half: a small ViT trained on handwritten digits, pruned, recovered, and run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import api
from ..data import DIGITS_CFG, ImageData, data_config, load_data
from ..pruning import Plan, recover
from ..spec import ViTSpec
from ._measure import accuracy
from ._output import Output, percent

PATCH, WIDTH, DEPTH, HEADS = 2, 64, 4, 4
BATCH, METHOD, KEPT = 64, "snp", "50%"
TRAINING: dict[str, Any] = {"lr": 3e-3, "warmup_epochs": 5, "clip_grad": 1.0, "smoothing": 0.1}
RECOVERY: dict[str, Any] = {"lr": 2e-3, "warmup_epochs": 1, "clip_grad": 1.0}


@dataclass(frozen=True)
class Steps:
    """How long each part trains. The numbers of steps are fixed, whatever the machine."""

    epochs: int = 60
    recovery_epochs: int = 30


def digits_vit() -> nn.Module:
    """A timm ViT for 8 by 8 grey images."""
    from timm.models.vision_transformer import VisionTransformer

    model: nn.Module = VisionTransformer(
        img_size=DIGITS_CFG["input_size"][1:],
        patch_size=PATCH,
        in_chans=1,
        num_classes=10,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
    )
    model.pretrained_cfg = dict(DIGITS_CFG)  # type: ignore[assignment]
    return model


def run_digits(output: Output, out: Path, seed: int, steps: Steps) -> tuple[dict[str, Any], ViTSpec, ViTSpec]:
    """Train, prune, recover, save, load and evaluate; the report's part, and the specs before and after."""
    torch.manual_seed(seed)
    data = load_data("digits")
    config = data_config(DIGITS_CFG, DIGITS_CFG["input_size"])
    test = data.loader("test", config, batch_size=data.size("test"))
    train = data.loader("train", config, batch_size=BATCH, augment=True, seed=seed)
    output.say(
        f"handwritten digits: {data.size('train')} images to train on, {data.size('calibration')} to calibrate, "
        f"{data.size('test')} to test"
    )

    dense = digits_vit()
    with output.bar("training a dense ViT") as bar:
        recover(dense, train, on_step=bar.step, epochs=steps.epochs, seed=seed, **TRAINING)
    before = accuracy(dense.eval(), test).top1
    spec = ViTSpec.from_timm(dense)
    output.say(f"dense: {percent(before)} of the test images right")

    with output.bar(f"pruning by {METHOD}") as bar:
        calibration = data.loader("calibration", config, batch_size=BATCH, seed=seed)
        # ranks among all heads and layers alike: the published default takes the same share of each, which shows less
        pruned = api.prune(dense, METHOD, {"macs": KEPT}, bar.over(calibration), seed=seed, isomorphic=True)
    share, found = pruned.spec.macs() / spec.macs(), accuracy(pruned.eval(), test).top1
    output.say(f"pruned to {percent(share)} of the MACs: {percent(found)}")
    with output.bar("recovering it, the dense ViT as teacher") as bar:
        epochs = steps.recovery_epochs
        recover(pruned, train, teacher=dense, on_step=bar.step, epochs=epochs, seed=seed, **RECOVERY)
    after = accuracy(pruned.eval(), test).top1
    output.say(f"recovered: {percent(after)}")

    pruned.provenance |= {"base_model": "digits_vit (prunevit demo)", "accuracy": {"test": after, "data": "digits"}}
    checkpoint = api.save(pruned, out / "checkpoint")
    runtime = api.Runtime(checkpoint, device="cpu")
    loaded = api.load(checkpoint)
    masked = Plan.from_dict(loaded.plan or {}).lift(loaded).eval()
    write_images(data, out / "images")
    part = {
        "dense": {"accuracy": before, "params": spec.params(), "macs": spec.macs()},
        "pruned": {
            "accuracy": after,
            "params": pruned.spec.params(),
            "macs": pruned.spec.macs(),
            "method": METHOD,
        },
        "runtime": {
            "accuracy": accuracy(runtime, test).top1,
            "max_error_vs_masked_dense": largest_difference(runtime, masked, test),
        },
    }
    return part, spec, pruned.spec


@torch.inference_mode()
def largest_difference(runtime: Any, masked: nn.Module, loader: Any) -> float:
    """The largest difference between two models' logits over all images."""
    return max(float((runtime(images) - masked(images)).abs().max()) for images, _ in loader)


def write_images(data: ImageData, folder: Path) -> None:
    """One test image of each class as a file, to run the checkpoint on."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    digits: Any = data.splits["test"]
    for image, label in (digits[i] for i in range(len(data.label_names))):  # a split comes one of each class at a time
        Image.fromarray(image[0].numpy()).save(folder / f"{data.label_names[label]}.png")
