"""Which image falls in which split: by its name alone."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Literal

Split = Literal["train", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "validation", "test")

Sample = tuple[str, int]  # what names the image (a path, or an index), and its class

# a share of the training images, and the number of images above which it is not followed
_CARVED: dict[Split, tuple[float, int]] = {
    "test": (0.2, 50_000),
    "validation": (0.1, 10_000),
    "calibration": (0.1, 2048),
}


def split_all(given: Mapping[Split, list[Sample]], names: Mapping[str, str] | None = None) -> dict[Split, list[Sample]]:
    """All four splits, from those that the source gives; ``names`` are what samples are told apart by.

    Every split comes one image of each class at a time, so that any first part of it is spread over the classes.
    """
    keys = names or {sample[0]: sample[0] for samples in given.values() for sample in samples}
    splits = dict(given)
    if "test" not in splits and "validation" in splits:
        splits["test"] = splits.pop("validation")  # the only held-out images: nothing may be tuned on them
    carved: tuple[Split, ...] = ("test", "validation", "calibration")
    for split in carved:
        if split not in splits:
            splits[split], splits["train"] = _carve(_by_class(splits["train"], split, keys), split)
    return {split: _spread(_by_class(samples, split, keys)) for split, samples in splits.items()}


def _by_class(samples: list[Sample], split: Split, keys: Mapping[str, str]) -> list[list[Sample]]:
    """The samples of each class, by a hash of their names: a new image moves hardly any other."""
    classes: dict[int, list[tuple[bytes, Sample]]] = defaultdict(list)
    for sample in samples:
        rank = hashlib.sha256(f"{split}/{keys[sample[0]]}".encode()).digest()
        classes[sample[1]].append((rank, sample))
    return [[sample for _, sample in sorted(ranked)] for _, ranked in sorted(classes.items())]


def _carve(classes: list[list[Sample]], split: Split) -> tuple[list[Sample], list[Sample]]:
    """A share of every class, and what is left; a class of one image keeps it for training."""
    share, limit = _CARVED[split]
    most = math.ceil(limit / max(1, len(classes)))
    taken, rest = [], []
    for samples in classes:
        count = min(math.ceil(share * len(samples)), most, len(samples) - 1)
        taken += samples[:count]
        rest += samples[count:]
    return taken, rest


def _spread(classes: list[list[Sample]]) -> list[Sample]:
    """One of each class at a time."""
    return [sample for row in zip_longest(*classes) for sample in row if sample is not None]
