"""What a whole model is held to, wherever it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from prunevit import PrunedViT


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def held_to_eager(model: PrunedViT, images: Tensor, got: Tensor, dtype: torch.dtype, units: int = 4) -> None:
    """At most twice what the same model is wrong by in eager PyTorch in the same dtype, and ``units`` of eps.

    ``model`` is in fp64 afterwards.
    """
    with torch.no_grad():
        rounded = model.to(images.device, dtype)
        eager = rounded(images.to(dtype))
        exact = rounded.double()(images.to(dtype).double())
    assert got.shape == exact.shape
    assert error(got, exact) <= 2 * error(eager, exact) + units * torch.finfo(dtype).eps
