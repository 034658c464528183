"""Tiny timm models with every parameter random, and how far apart two models may be."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": (8, 12)}


def tiny(name: str = "vit_tiny_patch16_224", **fields: Any) -> Any:
    model: nn.Module = timm.create_model(name, **(TINY | fields)).eval()
    randomise(model)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """A norm or a scale of ones would hide itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + 0.1)


def images(model: Any, batch: int = 2) -> Tensor:
    """With a mean: zero-mean inputs hide half of the masking faults."""
    size = model.patch_embed.img_size or (8, 12)
    return torch.randn(batch, model.patch_embed.proj.in_channels, *size, generator=torch.Generator().manual_seed(1)) + 3


@torch.no_grad()
def check_close(got: Tensor, eager: Tensor, truth: Tensor) -> None:
    """At most twice as wrong as eager PyTorch in the same dtype, both against fp64."""
    floor = torch.finfo(eager.dtype).eps * truth.abs().max()
    allowed = 2 * (eager.double() - truth).abs().max() + floor
    error = (got.double() - truth).abs().max()
    assert error <= allowed, f"off by {error:.3g}, allowed {allowed:.3g}"


@torch.no_grad()
def check_model(model: Any, eager: nn.Module, *inputs: Any) -> None:
    """``model`` computes what ``eager`` does: compared with it, and with it in fp64."""
    wide = copy.deepcopy(eager).double()
    doubled = [i.double() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
    check_close(model(*inputs), eager(*inputs), wide(*doubled))
