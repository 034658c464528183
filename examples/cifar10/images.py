"""CIFAR-10 from class folders: decoded once to bytes, then cut, flipped and normalised a whole batch at a time.

At 32 pixels reading a JPEG costs more than the model does. Which image falls in which split is prunevit's own rule
(`prunevit.data`): validation and calibration come out of the training images, and the test images stay apart.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from prunevit.data import SPLITS, Split, load_data

#: of the training images, per channel, as everybody uses them
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4


class Images:
    """The images of one split as bytes [n, 3, H, W], and their classes [n]."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        self.pixels, self.labels = pixels, labels

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, images: int) -> Images:
        """The first so many: a split comes one image of each class at a time."""
        return Images(self.pixels[:images], self.labels[:images])

    def sample(self, images: int, seed: int) -> Images:
        """So many, drawn by a seed."""
        chosen = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:images]
        return Images(self.pixels[chosen], self.labels[chosen])


class Batches:
    """Batches of (normalised images, labels). ``augment`` shuffles, flips and cuts; else every image comes, in order.

    ``steps`` makes a pass so many batches long, of as many shuffles as that takes. ``generator`` is what
    `prunevit.pruning.recover` seeds anew in each epoch, so that a resumed run sees the same images.
    """

    def __init__(
        self, images: Images, batch: int, *, augment: bool = False, steps: int | None = None, seed: int = 0
    ) -> None:
        self.images, self.batch, self.augment, self.steps = images, min(batch, len(images)), augment, steps
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        whole, rest = divmod(len(self.images), self.batch)
        return self.steps or (whole if self.augment else whole + (rest > 0))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(self._endless() if self.steps else self._once(), len(self))

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from self._once()

    def _once(self) -> Iterator[tuple[Tensor, Tensor]]:
        count = len(self.images)
        order = torch.randperm(count, generator=self.generator) if self.augment else torch.arange(count)
        for chosen in order.split(self.batch):  # type: ignore[no-untyped-call]
            if len(chosen) < self.batch and self.augment:
                return
            pixels = self.images.pixels[chosen]
            pixels = cut_and_flip(pixels, self.generator) if self.augment else pixels
            yield normalised(pixels), self.images.labels[chosen]


def normalised(pixels: Tensor) -> Tensor:
    mean, std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    return (pixels.float() - mean) / std


def cut_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image from a random place of its zero-padded self, and every second one mirrored."""
    n, _, height, width = pixels.shape
    padded = torch.nn.functional.pad(pixels, [PADDING] * 4)
    y, x = torch.randint(2 * PADDING + 1, (2, n), generator=generator)
    cut = padded.unfold(2, height, 1).unfold(3, width, 1)[torch.arange(n), :, y, x]
    mirrored = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, cut.flip(3), cut)


def open_images(source: Path, out: Path) -> Mapping[Split, Images]:
    """All four splits of a folder of class folders, or of an archive of one; decoded on the first call, then read."""
    cache = out / "images.safetensors"
    if not cache.exists():
        out.mkdir(parents=True, exist_ok=True)
        decode(unpacked(source, out / "unpacked"), cache)
    tensors = load_file(cache)
    return {split: Images(tensors[f"{split}.pixels"], tensors[f"{split}.labels"]) for split in SPLITS}


def unpacked(source: Path, folder: Path) -> Path:
    """The folder itself, or where the archive was unpacked; a single folder on the way down is passed through."""
    if source.is_file():
        if not folder.exists():
            partial = folder.with_name(folder.name + ".partial")
            with tarfile.open(source) as archive:
                archive.extractall(partial, filter="data")
            os.replace(partial, folder)
        source = folder
    inside = [entry for entry in source.iterdir() if entry.is_dir()]
    return unpacked(inside[0], folder) if len(inside) == 1 else source


def decode(root: Path, cache: Path) -> None:
    data = load_data(root)
    tensors: dict[str, Tensor] = {}
    for split in SPLITS:
        files = data.splits[split]
        pixels, labels = [], []
        for i in tqdm(range(len(files)), f"decoding {split}", mininterval=1):
            image, label = files[i]
            pixels.append(torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))
            labels.append(label)
        tensors[f"{split}.pixels"], tensors[f"{split}.labels"] = torch.stack(pixels), torch.tensor(labels)
    partial = cache.with_name(cache.name + ".partial")
    save_file(tensors, partial)
    os.replace(partial, cache)
