"""Images to prune, train and evaluate with: the built-in "digits", or a folder of class folders.

Every source gives four disjoint splits. ``test`` is only ever evaluated on; ``validation`` and ``calibration`` come out
of ``train``. Which image falls where depends on its name alone: the same on every machine and in every call, whatever
the seed of a run, so that a model is never tested on what an earlier command trained it with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ..errors import DataError, expect
from ._digits import DIGITS_CFG, Digits, read_digits
from ._folder import Files, new_classes, read_folder
from ._split import SPLITS, Split


@dataclass(frozen=True)
class ImageData:
    """Four disjoint splits of labelled images. ``label_names[i]`` is the name of class i."""

    name: str
    label_names: tuple[str, ...]
    splits: Mapping[Split, Digits | Files]

    def size(self, split: Split) -> int:
        return len(self.splits[split])

    def loader(
        self,
        split: Split,
        config: Mapping[str, Any],
        *,
        batch_size: int = 64,
        images: int | None = None,
        augment: bool = False,
        seed: int = 0,
        workers: int = 0,
    ) -> DataLoader[Any]:
        """Batches of normalised images [B, C, H, W] and their classes [B], as a model's data config wants them.

        ``config`` is what :func:`data_config` gives. ``augment`` shuffles and augments, for training; otherwise the
        order is fixed and every image comes once. ``images`` takes only that many, spread over the classes.
        """
        dataset: Digits | Files = self.splits[split]
        if not len(dataset):
            raise DataError(
                f"expected images in the {split} split of {self.name}, got none: splits without a folder of their own "
                "are a tenth or a fifth of each class's training images, and these are too few"
            )
        if images is not None:
            dataset = dataset.first(images)
        batch_size = min(batch_size, len(dataset))
        return dataset.loader(config, batch_size, augment, seed, workers)


def load_data(
    source: str | Path,
    *,
    num_classes: int | None = None,
    label_names: Sequence[str] | None = None,
) -> ImageData:
    """Open "digits", or a folder of class folders as timm and torchvision read it.

    A folder may hold ``train`` and ``val`` or ``test`` folders of classes (one held-out folder is the test split), or
    the class folders themselves, of which a fifth becomes the test split. Given a model's ``num_classes``, the classes
    must be the model's: matched by name where ``label_names`` (or, for 1000 classes, ImageNet's) has them all, else in
    order. Raises :class:`DataError`.
    """
    if str(source) == "digits":
        names, splits = read_digits()
        data = ImageData("digits", names, splits)
    else:
        folder, files = read_folder(Path(source), num_classes, label_names)
        data = ImageData(str(source), folder, files)
    count = len(data.label_names)
    fits = not num_classes or count == num_classes
    expect(
        fits, DataError, f"{num_classes} classes in {source}, as the model has", got=f"{count} ({new_classes(count)})"
    )
    return data


def data_config(pretrained_cfg: Mapping[str, Any], input_size: Sequence[int]) -> dict[str, Any]:
    """timm's data config for a model that takes ``input_size`` [C, H, W], whatever its pretrained weights took."""
    from timm.data import resolve_data_config

    config: dict[str, Any] = resolve_data_config({"input_size": tuple(input_size)}, pretrained_cfg=dict(pretrained_cfg))
    for name in ("mean", "std"):
        fits = len(config[name]) in (1, input_size[0])
        what = f"pretrained_cfg[{name!r}] to have one value for each of {input_size[0]} channels"
        expect(fits, DataError, what, got=config[name])
    return config


def class_names(pretrained_cfg: Mapping[str, Any]) -> list[str] | None:
    """The names of a model's classes, in order. timm's ``label_names`` is a list of them, or a mapping from indices."""
    names = pretrained_cfg.get("label_names")
    if isinstance(names, Mapping):
        by_index = {str(index): name for index, name in names.items()}  # JSON's keys are strings
        names = [by_index.get(str(index)) for index in range(len(names))]
    return None if names is None or None in names else [str(name) for name in names]


__all__ = ["DIGITS_CFG", "SPLITS", "ImageData", "Split", "class_names", "data_config", "load_data"]
