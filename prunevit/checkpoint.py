"""Checkpoints: a directory of ``model.safetensors``, ``config.json`` and, for a pruned model, ``plan.json``.

``docs/format.md`` specifies it. What is read is untrusted: sizes and shapes are checked against the spec, and the spec
against its bounds, before memory is allocated; nothing in it is executed. What is written replaces the directory whole.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ._atomic import expect_replaceable, replace_directory
from .errors import CheckpointError, InputError, expect
from .machine import installed
from .models.config import Config, config_of, pretrained_cfg_of
from .models.files import CONFIG, PLAN, WEIGHTS, parse_json, read_json, read_plan, unreplaced
from .models.from_timm import as_pruned
from .models.tensors import check_file, check_finite, check_state
from .models.vit import PrunedViT


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
    # a good checkpoint is not replaced by one that cannot be read
    config_of(parse_json(texts[CONFIG], "config"), "config")
    if PLAN in texts:
        parse_json(texts[PLAN], "plan")

    def write(directory: Path) -> None:
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (directory / name).write_bytes(text)

    try:
        replace_directory(path, write, (WEIGHTS, CONFIG, PLAN))
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise CheckpointError(f"{path}: expected to write a checkpoint directory, got {error}") from error
    return path


def load(path: str | os.PathLike[str]) -> PrunedViT:
    """Read a checkpoint directory. Raises :class:`CheckpointError` or :class:`SpecError`: file, field and reason."""
    return unreplaced(Path(path), _load)


def _load(directory: Path) -> PrunedViT:
    config = _read_config(directory)
    weights = directory / WEIGHTS
    check_file(config.spec, weights)
    plan = read_plan(directory / PLAN)
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
    return unreplaced(Path(path), _read_config)


def _read_config(directory: Path) -> Config:
    file = directory / CONFIG
    return config_of(read_json(file), file)


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


def _dumps(what: str, value: Any, indent: int | None = None) -> bytes:
    try:
        return (json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise CheckpointError(f"{what}: expected plain JSON values, got {error}") from None
