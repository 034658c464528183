"""Checkpoint directories to try things on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunevit import checkpoint
from prunevit.models import PrunedViT
from tests.specs import SPECS, random_model

FILES = ["config.json", "model.safetensors", "plan.json"]


def saved(directory: Path, name: str = "every_head_its_own_width", seed: int = 0) -> PrunedViT:
    model = random_model(SPECS[name], seed)
    model.plan = {"heads": {"blocks.0": [0, 2]}, "seed": seed}
    model.provenance = {"base_model": "deit_tiny_patch16_224", "method": "snp", "accuracy": 0.72}
    checkpoint.save(model, directory)
    return model


def edit(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8"))
    change(config)
    file.write_text(json.dumps(config), "utf-8")
