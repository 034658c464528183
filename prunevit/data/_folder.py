"""A folder of class folders, as timm and torchvision read it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError, expect
from ._split import Sample, Split, split_all

# the names that timm and torchvision look for
_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("val", "validation", "valid", "eval"),
    "test": ("test",),
}


class Files(Dataset[tuple[Any, int]]):
    """Image files, decoded as they are read. The loader sets ``transform`` and ``mode``."""

    transform: Callable[[Image.Image], Any] | None = None  # set by timm's create_loader

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples, self.mode = samples, "RGB"

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.samples[index]
        try:
            with Image.open(path) as file:
                image = file.convert(self.mode)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read the image {path}: {error}") from None
        return (image if self.transform is None else self.transform(image)), label

    def first(self, images: int) -> Files:
        return Files(self.samples[:images])

    def loader(self, config: Mapping[str, Any], batch: int, augment: bool, seed: int, workers: int) -> DataLoader[Any]:
        from timm.data import create_loader

        channels = config["input_size"][0]
        expect(channels in (1, 3), DataError, "a model of 1 or 3 channels to read image files with", got=channels)
        dataset = Files(self.samples)
        dataset.mode = "L" if channels == 1 else "RGB"
        keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
        torch.manual_seed(seed)  # timm's loader takes order and augmentation from the global generator
        loader: DataLoader[Any] = create_loader(
            dataset,
            batch_size=batch,
            is_training=augment,
            use_prefetcher=False,
            num_workers=workers,
            persistent_workers=False,  # workers that live on keep their first epoch's chance
            **{key: config[key] for key in keys},
        )
        return loader


def read_folder(
    root: Path, num_classes: int | None, label_names: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[Split, Files]]:
    """Class names, and the splits. Raises :class:`DataError`."""
    expect(root.is_dir(), DataError, "data to be 'digits' or a folder of class folders", got=f"{root}, no such folder")
    roots: dict[Split, Path] = {}
    for split, candidates in _FOLDERS.items():
        path = next((root / name for name in candidates if (root / name).is_dir()), None)
        if path is not None:
            roots[split] = path
    roots = roots or {"train": root}

    listed = {split: _listed(path) for split, path in roots.items()}
    first = next(iter(roots))
    folders = listed[first][1]
    indices, names = _class_indices(folders, num_classes, label_names)
    given: dict[Split, list[Sample]] = {"train": []}
    for split, (samples, own) in listed.items():
        also = sorted(set(own) - set(folders))
        expect(
            not also, DataError, f"{roots[split]} to have only the classes of {roots[first]}", got=f"also {also[:5]}"
        )
        given[split] = [(file, indices[own[label]]) for file, label in samples]
    relative = {file: Path(file).relative_to(root).as_posix() for samples in given.values() for file, _ in samples}
    return names, {split: Files(samples) for split, samples in split_all(given, relative).items()}


def _listed(root: Path) -> tuple[list[Sample], list[str]]:
    """Every image below the class folders of ``root``, and the classes, both in timm's order."""
    from timm.data import create_dataset
    from torchvision.datasets.folder import IMG_EXTENSIONS  # timm's own are .jpg, .jpeg and .png alone

    expect(any(entry.is_dir() for entry in os.scandir(root)), DataError, f"class folders in {root}", got="none")
    try:
        reader = create_dataset("", str(root), search_split=False, input_key=";".join(IMG_EXTENSIONS)).reader
    except RuntimeError:  # timm says so when it finds no image, and names other extensions
        kinds = " ".join(IMG_EXTENSIONS)
        raise DataError(f"expected images ({kinds}) in the class folders of {root}, got none") from None
    # timm would take the innermost folder for a class, wherever it is
    loose = [file for file, _ in reader.samples if Path(file).parent.parent != root]
    expect(not loose, DataError, f"every image of {root} right in a class folder", got=", ".join(loose[:3]))
    return list(reader.samples), list(reader.class_to_idx)


def _class_indices(
    folders: list[str], num_classes: int | None, label_names: Sequence[str] | None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The index of each class folder, and the names of all classes."""
    known = tuple(label_names or ())
    if num_classes == 1000 and not known:
        from timm.data import ImageNetInfo

        known = tuple(ImageNetInfo().label_names())
    if num_classes and set(folders) <= set(known):
        return {name: known.index(name) for name in folders}, known
    if num_classes and label_names:
        foreign = sorted(set(folders) - set(known))
        raise DataError(
            f"expected class folders named as the model's classes ({_some(known)}), got {_some(foreign)} "
            f"({new_classes(len(folders))})"
        )
    return {name: index for index, name in enumerate(folders)}, tuple(folders)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + ", …" * (len(names) > 5)


def new_classes(count: int) -> str:
    """What to do about data whose classes are not the model's."""
    ways = f"prunevit finetune --new-classes, or model.reset_classifier({count})"
    return f"to train a new classifier for these {count}: {ways}"
