"""What commands measure: accuracy and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose class is the most likely one, and among the five most likely (None below six classes)."""

    images: int
    top1: float
    top5: float | None


@torch.inference_mode()
def accuracy(model: Callable[[Tensor], Tensor], loader: Iterable[Any], device: torch.device | str = "cpu") -> Accuracy:
    """Top-1 and top-5 accuracy of anything that maps images to logits."""
    images = first = five = 0
    classes = 0
    for batch, labels in loader:
        logits = model(batch.to(device)).cpu()
        classes = logits.shape[1]
        top = logits.topk(min(5, classes), dim=1).indices == labels[:, None]
        images += len(labels)
        first += int(top[:, 0].sum())
        five += int(top.any(dim=1).sum())
    return Accuracy(images, first / images, five / images if classes > 5 else None)


@torch.inference_mode()
def interleaved_ms(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3, tick: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The median time of each call in ms. Each round makes every call once, so that a busy moment hits all alike."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
        tick()
    return {name: statistics.median(taken) for name, taken in times.items()}
