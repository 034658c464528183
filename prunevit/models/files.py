"""The JSON files of a checkpoint, read strictly."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

CONFIG, PLAN = "config.json", "plan.json"
MAX_BYTES = 2**24  # 16 MiB: the largest timm configuration, with 21,841 described labels, has 2


def read_plan(file: Path) -> dict[str, Any] | None:
    """A pruned model's plan; None where there is none."""
    return read_json(file) if file.exists() else None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object: no constants that JSON does not have, no key twice, at most ``MAX_BYTES``."""
    try:
        with open(file, "rb", opener=_without_waiting) as stream:
            regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            raw = stream.read(MAX_BYTES + 1) if regular else b""
    except OSError as error:
        raise CheckpointError(f"{file}: expected a readable file, got {error.strerror}") from None
    if not regular:
        raise CheckpointError(f"{file}: expected a regular file, got another kind")
    return parse_json(raw, str(file))


def _without_waiting(file: str, flags: int) -> int:
    return os.open(file, flags | os.O_NONBLOCK)  # a pipe would be waited for


def parse_json(raw: bytes, file: str) -> dict[str, Any]:
    """The same of what was read, or is about to be written."""
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"{file}: expected at most {MAX_BYTES} bytes, got more")
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name}, which JSON does not have")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(data := dict(pairs)) != len(pairs):
        raise ValueError("an object with one key twice")
    return data
