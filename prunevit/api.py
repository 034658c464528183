"""The facade: what ``import prunevit`` gives. It alone sees pruning and runtime together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint, pruning
from .errors import RuntimeMismatch
from .models.vit import PrunedViT
from .runtime import Runtime
from .spec import ViTSpec

# What exact folds in fp64 and another order of fp32 sums may differ by, as a share of the logits' own spread. Measured
# over the published shapes: below 2e-5.
GATE_TOLERANCE = 1e-3


def prune(
    model: nn.Module,
    method: str | Sequence[str] = "snp",
    constraints: Mapping[str, str | float] | None = None,
    data: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> PrunedViT:
    """Prune a timm ViT (or prune a pruned one further) to a budget; the result is a trainable module of its own shape.

    ``method``: a name of :data:`prunevit.pruning.METHODS`, or several that are applied one after another.
    ``constraints``: what remains, as a share of the given model or an absolute number: ``{"macs": "45%"}``,
    ``{"params": 10e6}``, ``{"macs": 2.0e9, "params": "50%"}``. ``data``: batches of (images, labels) that the scores
    are measured on; methods that look at weights alone need none. ``options`` are the method's own.

    Raises :class:`UnsupportedModel`, :class:`PruningError`, :class:`BudgetError`.
    """
    return pruning.prune(model, method, constraints, data, seed=seed, **options)


def save(model: PrunedViT, path: str | os.PathLike[str], *, check: bool = True) -> Path:
    """Write a checkpoint directory: atomically, and only if the runtime computes what the module computes.

    ``check=False`` leaves the comparison out. Raises :class:`RuntimeMismatch`, :class:`CheckpointError`.
    """
    if check:
        gate(model)
    return checkpoint.save(model, path)


def load(path: str | os.PathLike[str]) -> PrunedViT:
    """Read a checkpoint directory as a trainable module. Raises :class:`CheckpointError`, :class:`SpecError`."""
    return checkpoint.load(path)


def gate(model: PrunedViT, batch: int = 2) -> float:
    """The largest difference between a module and its runtime on random images, as a share of the logits' spread.

    Raises :class:`RuntimeMismatch` above :data:`GATE_TOLERANCE`.
    """
    spec: ViTSpec = model.spec
    images = torch.randn(batch, spec.in_chans, *spec.img_size, generator=torch.Generator().manual_seed(0))
    first = next(model.parameters())
    training = model.training
    try:
        with torch.no_grad():
            expected = model.eval()(images.to(first.device, first.dtype)).float().cpu()
    finally:
        model.train(training)
    got = Runtime(model, device="cpu", dtype=torch.float32)(images)
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= GATE_TOLERANCE:
        raise RuntimeMismatch(
            f"expected the runtime within {GATE_TOLERANCE:g} of the module's outputs, got {error:.3g}: "
            "nothing was written. Please report this with the spec (save with check=False to keep the weights)."
        )
    return error


__all__ = ["GATE_TOLERANCE", "Runtime", "gate", "load", "prune", "save"]
