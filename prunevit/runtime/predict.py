"""From photographs to named classes, by timm's own data config and label names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import Tensor

from ..data import class_names, data_config
from ..errors import InputError, expect
from ..models.config import pretrained_cfg_of
from ..spec import ViTSpec

ImageLike = str | os.PathLike[str] | Image.Image


@dataclass(frozen=True)
class Prediction:
    """One class: its index, its name where one is known, its probability."""

    index: int
    label: str
    probability: float


class Predictor:
    """Prepares images and names classes for one model."""

    def __init__(self, pretrained_cfg: Mapping[str, Any], spec: ViTSpec) -> None:
        self.cfg, self.size = pretrained_cfg_of(spec, pretrained_cfg), (spec.in_chans, *spec.img_size)
        self.mode = "L" if spec.in_chans == 1 else "RGB"
        self.labels = _labels(pretrained_cfg, spec.num_classes)

    @cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """timm's, made when images come: a model whose images others prepare needs none."""
        try:
            made: Callable[[Image.Image], Tensor] = create_transform(**data_config(self.cfg, self.size))
        except (KeyError, ValueError, AssertionError) as error:
            raise InputError(f"expected a pretrained_cfg that timm can prepare images by, got {error!r}") from error
        return made

    def prepare(self, images: Sequence[ImageLike]) -> Tensor:
        """[B, C, H, W] in fp32, whatever PyTorch's default is."""
        return torch.stack([self.transform(self._open(image)) for image in images]).float()

    def _open(self, image: ImageLike) -> Image.Image:
        if isinstance(image, Image.Image):
            return image.convert(self.mode)
        expect(isinstance(image, str | os.PathLike), InputError, "a path or a PIL image", got=type(image).__name__)
        path = Path(image)
        expect(path.is_file(), InputError, "the path of an image", got=f"{path}, which is no file")
        try:
            with Image.open(path) as opened:
                return opened.convert(self.mode)
        except Exception as error:  # each format has its own: a SyntaxError for a broken PNG, a ValueError for a PPM
            raise InputError(f"expected an image that Pillow reads, got {path}: {error}") from error

    def top(self, logits: Tensor, top_k: int) -> list[list[Prediction]]:
        """The most likely classes of each row, best first."""
        probabilities = logits.float().softmax(dim=-1).cpu()
        best = probabilities.topk(min(top_k, probabilities.shape[-1]), dim=-1)
        return [
            [Prediction(int(i), self.labels[int(i)], float(p)) for i, p in zip(indices, values)]
            for indices, values in zip(best.indices, best.values)
        ]


def _labels(cfg: Mapping[str, Any], num_classes: int) -> list[str]:
    """The checkpoint's own labels, else ImageNet's where the class count is one of its subsets', else numbers.

    ``label_descriptions`` has more words for a name.
    """
    own = class_names(cfg)
    if own is not None and len(own) == num_classes:
        words = cfg.get("label_descriptions") or {}
        return [str(words.get(name, name)) for name in own]
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return [f"class {i}" for i in range(num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(i) for i in range(num_classes)]
