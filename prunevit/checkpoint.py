"""Checkpoints: a directory of ``model.safetensors``, ``config.json`` and, for a pruned model, ``plan.json``.

``docs/format.md`` specifies it. What is read is untrusted: sizes and shapes are checked against the spec, and the spec
against its bounds, before memory is allocated; nothing in it is executed. What is written replaces the directory whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ._atomic import expect_replaceable, left_beside, replace_directory
from .errors import CheckpointError, InputError, SpecError, expect
from .machine import installed
from .models.from_timm import as_pruned
from .models.origin import CONFIG, MAX_CONFIG_BYTES, MAX_PLAN_BYTES, PLAN, read_json
from .models.registry import WEIGHTS, pretrained_cfg_of
from .models.tensors import check_file, check_finite, check_state
from .models.vit import PrunedViT
from .spec import ViTSpec

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """What a ``config.json`` says, checked."""

    spec: ViTSpec
    pretrained_cfg: dict[str, Any]
    provenance: dict[str, Any]


class _DataConfig(BaseModel):
    """The fields of ``pretrained_cfg`` that reading images and labels relies on; others are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    input_size: tuple[int, int, int]
    test_input_size: tuple[int, int, int] | None = None
    mean: tuple[float, ...] = Field(default=(0.485, 0.456, 0.406), min_length=1, max_length=4096)
    std: tuple[Annotated[float, Field(gt=0)], ...] = Field(default=(0.229, 0.224, 0.225), min_length=1, max_length=4096)
    interpolation: str = "bicubic"
    crop_pct: float = Field(default=0.875, gt=0, le=4)
    test_crop_pct: float | None = Field(default=None, gt=0, le=4)
    crop_mode: str = "center"
    label_names: tuple[str, ...] | dict[str, str] | None = None
    label_descriptions: dict[str, str] | None = None


def save(model: PrunedViT, path: str | os.PathLike[str]) -> Path:
    """Write a checkpoint directory, replacing one that is there whole; its other files are kept.

    Raises :class:`CheckpointError` for a path that cannot be replaced (a file, a mount point, the current directory or
    one that holds it), for weights that are not finite or not the spec's, and for a plan or provenance that JSON cannot
    hold; nothing is written then.
    """
    expect_replaceable(path)
    path = Path(path)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    check_state(model.spec, state, "model")
    memory = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values())
    for name, tensor in state.items():  # safetensors holds no tensor twice: tied weights are written as two
        state[name] = tensor.clone() if memory[tensor.untyped_storage().data_ptr()] > 1 else tensor
    texts = {CONFIG: _dumps("config", _config(model), indent=2)}
    if model.plan is not None:
        texts[PLAN] = _dumps("plan", model.plan)

    def write(directory: Path) -> None:
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (directory / name).write_text(text + "\n", "utf-8")

    try:
        replace_directory(path, write, (WEIGHTS, CONFIG, PLAN))
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(f"{path}: expected to write a checkpoint directory, got {error}") from error
    return path


def load(path: str | os.PathLike[str]) -> PrunedViT:
    """Read a checkpoint directory. Raises :class:`CheckpointError` or :class:`SpecError`: file, field and reason."""
    return _unreplaced(Path(path), _load)


def _load(directory: Path) -> PrunedViT:
    config = _read_config(directory)
    weights = directory / WEIGHTS
    check_file(config.spec, weights)
    plan = read_json(directory / PLAN, MAX_PLAN_BYTES) if (directory / PLAN).exists() else None
    model = PrunedViT(config.spec, device="meta")  # no memory yet: each tensor of the file becomes a parameter
    with safe_open(weights, framework="pt") as file:
        # cloned, because what safetensors gives is the mapped file, which someone may overwrite
        state = {name: check_finite(name, file.get_tensor(name), str(weights)).clone() for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(state, assign=True)
    model.plan, model.provenance, model.pretrained_cfg = plan, config.provenance, config.pretrained_cfg
    return model.eval()


def model_of(model: str | os.PathLike[str] | nn.Module) -> PrunedViT:
    """A checkpoint directory, a PrunedViT or a timm ViT as a PrunedViT."""
    if isinstance(model, nn.Module):
        return as_pruned(model)
    given = type(model).__name__
    expect(isinstance(model, str | os.PathLike), InputError, "a checkpoint directory or a model", got=given)
    return load(model)


def read_config(path: str | os.PathLike[str]) -> Config:
    """Read and check ``config.json`` of a checkpoint directory; no tensor is touched."""
    return _unreplaced(Path(path), _read_config)


def _unreplaced(directory: Path, read: Callable[[Path], T]) -> T:
    """What is read from a directory, all of it from the same one: anew if a save has replaced it meanwhile."""
    while True:
        try:
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            named: dict[type[Exception], str] = {FileNotFoundError: "none", NotADirectoryError: "a file"}
            found, hint = named.get(type(error), str(error)), ""
            if isinstance(error, FileNotFoundError) and (previous := left_beside(directory)):
                hint = f"; a save was killed halfway: the old one is {previous[0]}"
            raise CheckpointError(f"{directory}: expected a checkpoint directory, got {found}{hint}") from None
        try:  # held open, so that no other directory gets its number
            result = read(directory)
        except Exception:  # whatever two halves of different checkpoints lead to
            if _is_still(directory, handle):
                raise
        else:
            if _is_still(directory, handle):
                return result
        finally:
            os.close(handle)


def _is_still(directory: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(directory), os.fstat(handle))
    except FileNotFoundError:
        return False


def _read_config(directory: Path) -> Config:
    file = directory / CONFIG
    data = read_json(file, MAX_CONFIG_BYTES)
    if data.get("architecture") != "prunevit":
        raise CheckpointError(f"{file}: architecture: expected 'prunevit', got {data.get('architecture')!r:.60}")
    args, provenance, cfg = (_object(file, data, name) for name in ("model_args", "prunevit", "pretrained_cfg"))
    try:
        spec = ViTSpec.from_dict(_object(file, args, "spec"))
    except SpecError as error:
        raise SpecError(f"{file}: model_args.spec: {error}") from None
    stated = {"num_classes": spec.num_classes, "num_features": spec.embed_dim, "global_pool": spec.global_pool}
    for name, value in stated.items():
        if data.get(name) != value:
            raise CheckpointError(f"{file}: {name}: expected {value!r} as the spec has, got {data.get(name)!r:.60}")
    try:
        _DataConfig.model_validate(cfg)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{file}: pretrained_cfg.{where}: {first['msg']}, got {first['input']!r:.60}") from None
    if list(cfg["input_size"]) != [spec.in_chans, *spec.img_size]:
        raise CheckpointError(
            f"{file}: pretrained_cfg.input_size: expected {[spec.in_chans, *spec.img_size]} as the spec has, "
            f"got {cfg['input_size']}"
        )
    return Config(spec, cfg, provenance)


def _config(model: PrunedViT) -> dict[str, Any]:
    spec = model.spec
    return {
        "architecture": "prunevit",
        "num_classes": spec.num_classes,
        "num_features": spec.embed_dim,
        "global_pool": spec.global_pool,
        "pretrained_cfg": pretrained_cfg_of(spec, model.pretrained_cfg),
        "model_args": {"spec": spec.to_dict()},
        # unknown: of a source tree that is not installed
        "prunevit": {**model.provenance, "prunevit_version": installed("prunevit") or "unknown"},
    }


def _dumps(what: str, value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: expected plain JSON values, got {error}") from None


def _object(file: Path, data: dict[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name}: expected an object, got {value!r:.60}")
    return value
