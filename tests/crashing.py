"""A save that ends without a word at a chosen step, for a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from prunevit import _atomic, checkpoint
from tests.specs import SPECS, random_model

CRASHED = 9


def save_until(step: int, directory: Path, exchange: str) -> None:
    """Save ``random_model(…, seed=1)``; end just before the ``step``-th change to the disk, if there are so many."""
    torch.set_num_threads(1)
    model, count = random_model(SPECS["every_head_its_own_width"], seed=1), 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == step:
                os._exit(CRASHED)
            count += 1
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "rename", "link", "unlink", "rmdir", "chmod", "chown"):
        setattr(os, name, counted(getattr(os, name)))
    Path.write_bytes = counted(Path.write_bytes)  # type: ignore[method-assign]
    write = checkpoint.save_file

    def save_file(state: dict[str, torch.Tensor], file: Path, **options: Any) -> None:
        half = file.with_name(".tmpAb12Cd")  # safetensors renames one, out of Python's sight
        half.write_bytes(b"half of the weights")
        half.unlink()
        write(state, file, **options)

    checkpoint.save_file = counted(save_file)
    _atomic.exchange = counted(getattr(_atomic, exchange))
    checkpoint.save(model, directory)
    os._exit(0)
