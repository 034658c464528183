"""The dense model, how it is trained, and how what is left of it is trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from images import MEAN, STD, Batches
from setting import Setting
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from tqdm import tqdm

from prunevit.pruning import Step, recover


def dense_vit(setting: Setting, width: int, patch_drop: float = 0.0) -> VisionTransformer:
    """A timm ViT for small colour images."""
    size = (setting.image, setting.image)
    model = VisionTransformer(
        img_size=size,
        patch_size=setting.patch,
        num_classes=10,
        embed_dim=width,
        depth=setting.depth,
        num_heads=setting.heads,
        patch_drop_rate=patch_drop,
    )
    model.pretrained_cfg = {
        "input_size": (3, *size),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "num_classes": 10,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return model


def train_dense(
    setting: Setting, width: int, train: Batches, state: Path, seed: int
) -> tuple[VisionTransformer, list[dict[str, float]]]:
    """Train, or go on training, from ``state``; the model that comes back sees every patch."""
    torch.manual_seed(seed)
    model = dense_vit(setting, width, setting.patch_drop)
    if setting.compiled:
        model.compile()  # a quarter off the time of a step, once it is compiled
    with Bar(f"dense, width {width}") as bar:
        history = recover(
            model,
            train,
            state=state,
            on_step=bar.step,
            epochs=setting.epochs,
            lr=setting.lr,
            warmup_epochs=1,
            clip_grad=1.0,
            smoothing=0.1,
            seed=seed,
        )
    whole = dense_vit(setting, width)
    whole.load_state_dict(model.state_dict())
    return whole.eval(), history


def recovery(setting: Setting) -> dict[str, Any]:
    """The options of `recover` for every method; the teacher is the dense model."""
    return {"lr": setting.recovery_lr, "clip_grad": 1.0}


def recover_for(model: nn.Module, teacher: nn.Module, train: Batches, setting: Setting, seed: int, what: str) -> None:
    """One pass over ``train``, which is as long as there are steps."""
    with Bar(what) as bar:
        recover(model, train, teacher=teacher, on_step=bar.step, epochs=1, seed=seed, **recovery(setting))
    model.eval()


class Bar:
    """A progress bar over optimiser steps."""

    def __init__(self, what: str) -> None:
        self.bar = tqdm(desc=what, unit="step", mininterval=2, smoothing=0.05)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def step(self, step: Step) -> None:
        self.bar.total = step.total
        self.bar.set_postfix(epoch=step.epoch, loss=f"{step.loss:.2f}", refresh=False)
        self.bar.update(step.step - self.bar.n)
