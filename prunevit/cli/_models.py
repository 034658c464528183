"""The model that a word on the command line means."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._atomic import left_beside
from ..errors import CheckpointError, DataError, InputError, UnsupportedModel

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..data import ImageData
    from ..runtime import Runtime
    from ..spec import ViTSpec
    from ._options import BackendChoice


def is_checkpoint(name: str) -> bool:
    """Whether a name means a directory: it is one, or is spelled as a path."""
    return Path(name).exists() or os.sep in name or name.startswith(".")


def expect_there(model: str | Path, data: str | None = None) -> None:
    """Refuse a path that leads nowhere before anything heavy is loaded."""
    if isinstance(model, Path) or is_checkpoint(model):
        path = Path(model)
        if not path.exists() and not left_beside(path):
            raise CheckpointError(f"{path}: expected a checkpoint directory, got none")
    if data is not None and data != "digits" and not Path(data).is_dir():
        found = "a file" if Path(data).exists() else "none"
        raise DataError(f"{data}: expected 'digits' or a folder of class folders, got {found}")


def device_of(name: str | None) -> torch.device:
    """The device asked for, or a GPU where there is one; under torchrun, each process's own."""
    import torch

    from ..runtime.backend import device_named

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = device_named(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"expected an NVIDIA GPU for device {name}, got none that torch sees")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    return device


def open_model(name: str, *, pretrained: bool = True, or_random: bool = True) -> nn.Module:
    """A checkpoint directory as a :class:`PrunedViT`, or a timm model by its name.

    ``or_random``: whether the command has --no-pretrained for this model, for the remedy that an error names.
    """
    if is_checkpoint(name):
        from .. import checkpoint

        return checkpoint.load(Path(name))
    import timm

    _check_timm_name(name)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except (OSError, RuntimeError) as error:  # no network, no such tag, no weights published
        if not pretrained:
            raise
        raise CheckpointError(
            f"expected to get the trained weights of {name}, got {type(error).__name__}: {error}. "
            "Give a checkpoint directory" + ", or start from random weights with --no-pretrained" * or_random
        ) from error
    return model


def spec_of(name: str) -> tuple[ViTSpec, ViTSpec | None]:
    """The spec of a checkpoint directory, a published shape or a timm model, and the dense one that it came from."""
    from .. import shapes

    if name in (*shapes.names(), *shapes.names(dense=True)):
        entry = shapes.entry(name)
        return shapes.get(name), shapes.get(entry["dense"]) if "dense" in entry else None
    if is_checkpoint(name):
        from .. import checkpoint
        from ..pruning import Plan

        model = checkpoint.load(Path(name))
        return model.spec, Plan.from_dict(model.plan).dense if model.plan else None
    import timm
    import torch

    from ..models.from_timm import spec_of as timm_spec

    _check_timm_name(name)
    with torch.device("meta"):  # the shape alone: no weights are made
        return timm_spec(timm.create_model(name)), None


def _check_timm_name(name: str) -> None:
    import timm

    from .. import shapes

    if not timm.is_model(name.removeprefix("timm/")) and not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        near = difflib.get_close_matches(name, [*shapes.names(), *timm.list_models()], n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UnsupportedModel(f"expected a checkpoint directory or a timm model, got {name!r}{hint}")


def input_size(model: Any) -> tuple[int, int, int]:
    """[C, H, W] that a timm ViT or a :class:`PrunedViT` was built for."""
    from ..models.from_timm import spec_of as timm_spec
    from ..models.vit import PrunedViT

    spec = model.spec if isinstance(model, PrunedViT) else timm_spec(model)
    return spec.in_chans, *spec.img_size


def data_for(model: Any, source: str, *, new_classes: bool = False) -> tuple[ImageData, dict[str, Any]]:
    """The images of ``source`` with the model's classes, and the data config that the model wants."""
    from ..data import class_names, data_config, load_data

    cfg = model.pretrained_cfg
    classes = None if new_classes else model.num_classes
    data = load_data(source, num_classes=classes, label_names=None if new_classes else class_names(cfg))
    return data, data_config(cfg, input_size(model))


def open_runtime(model: str | Path | nn.Module, backend: BackendChoice) -> Runtime:
    """The runtime of a checkpoint or a module."""
    from ..runtime import Runtime

    return Runtime(model, backend=backend)
