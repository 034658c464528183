"""The files of a checkpoint directory, all of one save; its JSON files are read strictly."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .._atomic import left_beside
from ..errors import CheckpointError

WEIGHTS, CONFIG, PLAN = "model.safetensors", "config.json", "plan.json"
MAX_BYTES = 2**24  # 16 MiB: the largest timm configuration, with 21,841 described labels, has 2
SEARCHED = getattr(os, "O_PATH", os.O_RDONLY)  # a directory that is opened to be known again need not be listed

T = TypeVar("T")


def unreplaced(directory: Path, read: Callable[[Path], T]) -> T:
    """What is read from a directory, all of it from the same one: anew if a save has replaced it meanwhile."""
    while True:
        try:
            handle = os.open(directory, SEARCHED | os.O_DIRECTORY)
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
