"""A training run on disk: tensors in safetensors, the rest in its JSON header. No pickle; written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import CheckpointError, expect


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's spec, of the plan that led to it, and of its weights."""
    spec = getattr(model, "spec", None)
    origin = spec and spec.to_dict(), getattr(model, "plan", None)
    digest = hashlib.sha256(json.dumps(origin, sort_keys=True).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def write_state(path: Path, modules: Mapping[str, nn.Module], optimizer: Optimizer, facts: Mapping[str, Any]) -> None:
    """``facts`` are JSON-able: what run this is, how far it has come, and the state of its schedule."""
    tensors = {f"{key}.{name}": w for key, module in modules.items() for name, w in module.state_dict().items()}
    state = optimizer.state_dict()
    numbers: dict[str, dict[str, float]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    header = {**facts, "optimizer": {"numbers": numbers, "groups": state["param_groups"]}}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: w.detach().contiguous().clone() for name, w in tensors.items()}, partial, {"run": json.dumps(header)}
    )
    os.replace(partial, path)


def read_facts(path: Path) -> dict[str, Any]:
    """What :func:`write_state` was told. Raises :class:`CheckpointError`."""
    try:
        with safe_open(path, "pt") as file:
            facts: dict[str, Any] = json.loads((file.metadata() or {})["run"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: expected the state of a training run, or a name that no file has yet, got {error}"
        ) from None
    return facts


def read_state(path: Path, facts: Mapping[str, Any], modules: Mapping[str, nn.Module], optimizer: Optimizer) -> None:
    """Load tensors into modules and optimiser; ``facts`` are those of the file. Raises :class:`CheckpointError`."""
    state: dict[int, dict[str, Any]] = {}
    parts: dict[str, dict[str, Tensor]] = {key: {} for key in modules}
    with safe_open(path, "pt") as file:
        for full in file.keys():  # noqa: SIM118, the handle is no mapping
            key, _, name = full.partition(".")
            if key == "optimizer":
                index, _, entry = name.partition(".")
                state.setdefault(int(index), {})[entry] = file.get_tensor(full)
            else:
                expect(key in parts, CheckpointError, f"parts {sorted(parts)} in {path}", got=key)
                parts[key][name] = file.get_tensor(full)
    for index, numbers in facts["optimizer"]["numbers"].items():
        state.setdefault(int(index), {}).update(numbers)
    for key, module in modules.items():
        module.load_state_dict(parts[key])
    optimizer.load_state_dict({"state": state, "param_groups": facts["optimizer"]["groups"]})
