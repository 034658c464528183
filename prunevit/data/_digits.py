"""scikit-learn's handwritten digits: 1797 real images of 8 by 8 pixels that ship with the library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ._split import Split, split_all

#: timm's data config of the built-in digits at their own size, for a model's ``pretrained_cfg``.
DIGITS_CFG: Mapping[str, Any] = {
    "input_size": (1, 8, 8),
    "mean": (0.305,),
    "std": (0.376,),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "num_classes": 10,
    "label_names": tuple("0123456789"),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
}


class Digits(Dataset[tuple[Tensor, int]]):
    """Grey images held as bytes [n, 1, 8, 8]."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])

    def first(self, images: int) -> Digits:
        return Digits(self.images[:images], self.labels[:images])

    def loader(self, config: Mapping[str, Any], batch: int, augment: bool, seed: int, workers: int) -> DataLoader[Any]:
        # whole batches are transformed at once: 8 px images cost more to handle one by one than the model costs to run
        collate = DigitsBatch(config, torch.Generator().manual_seed(seed) if augment else None)
        order = torch.Generator().manual_seed(seed)
        return DataLoader(self, batch, shuffle=augment, drop_last=augment, generator=order, collate_fn=collate)


class DigitsBatch:
    """Bytes to normalised images of a model's size; with a generator, each under a small affine map of its own."""

    def __init__(self, config: Mapping[str, Any], generator: torch.Generator | None) -> None:
        self.channels, *self.size = config["input_size"]
        self.mean, self.std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        self.generator = generator

    def __call__(self, batch: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        images = torch.stack([image for image, _ in batch]).float() / 255
        if self.generator is not None:
            images = small_affine(images, self.generator)
        if list(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
        images = (images.expand(-1, self.channels, -1, -1) - self.mean) / self.std
        return images, torch.tensor([label for _, label in batch])


def small_affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn by up to 10°, shear and scale by up to 10 %, shift by half a pixel; black comes in. Some stay."""
    # the strokes are a pixel wide: stronger maps, or blurring every image, cost more accuracy than they bring
    amounts = 2 * torch.rand(5, len(images), generator=generator) - 1
    amounts *= torch.rand(len(images), generator=generator) < 0.7
    turn, shear, zoom = math.radians(10) * amounts[0], 0.1 * amounts[1], 0.1 * amounts[2]
    x, y = (0.5 / images.shape[3]) * 2 * amounts[3], (0.5 / images.shape[2]) * 2 * amounts[4]
    rows = (
        torch.stack([turn.cos() + zoom, shear - turn.sin(), x], 1),
        torch.stack([turn.sin(), turn.cos() + zoom, y], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def read_digits() -> tuple[tuple[str, ...], dict[Split, Digits]]:
    """Class names, and the splits. Raises :class:`DataError` where scikit-learn is missing."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("sklearn"):
            raise
        raise DataError(
            "data 'digits' comes with scikit-learn, which is missing: pip install 'prunevit[demo]'"
        ) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    splits = split_all({"train": [(str(i), int(label)) for i, label in enumerate(labels)]})
    chosen = {split: torch.tensor([int(i) for i, _ in samples]) for split, samples in splits.items()}
    return DIGITS_CFG["label_names"], {split: Digits(images[i], labels[i]) for split, i in chosen.items()}
