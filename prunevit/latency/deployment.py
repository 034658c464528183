"""Where a pruned model will run: what its latency and memory are measured for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from prunevit_kernels import BackendName, Target

from .._options import check_types
from ..errors import InputError, PruningError, expect
from ..runtime.backend import choose_target
from ..runtime.sizes import memory_bytes
from ..spec import ViTSpec
from .table import default_path


@dataclass(frozen=True)
class Deployment:
    """``device``, ``dtype``, ``backend`` and ``threads`` are those of :class:`Runtime`, chosen as it chooses.

    ``batch`` images a call. ``table`` is the file of the cost table (None: one in the user's cache folder, measured
    anew where it belongs to another machine or version). ``tolerance`` is how far the whole pruned model may be from
    what the table says, and from the budget; ``attempts`` are how often pruning is repeated, each time with a table
    corrected by what the last result took, before :class:`LatencyMiss` (None: 3, or 1 where a method trains).
    ``remeasure`` believes nothing that the table has, and measures it anew.
    """

    device: str | torch.device | None = None
    batch: int = 1
    dtype: torch.dtype | str | None = None
    backend: BackendName | Literal["auto"] = "auto"
    threads: int | None = None
    table: str | os.PathLike[str] | None = None
    tolerance: float = 0.05
    attempts: int | None = None
    remeasure: bool = False

    def __post_init__(self) -> None:
        check_types(type(self), vars(self), InputError)
        expect(self.batch >= 1, InputError, "a batch of at least one image", got=self.batch)
        expect(0 < self.tolerance < 1, InputError, "a tolerance between 0 and 1", got=self.tolerance)
        fine = self.attempts is None or self.attempts >= 1
        expect(fine, InputError, "at least one attempt", got=self.attempts)
        if isinstance(self.dtype, str):
            dtype = getattr(torch, self.dtype, None)
            expect(isinstance(dtype, torch.dtype), InputError, "a dtype such as float32 or bfloat16", got=self.dtype)
            object.__setattr__(self, "dtype", dtype)

    @classmethod
    def of(cls, options: Deployment | Mapping[str, Any] | None) -> Deployment:
        """A deployment, or its fields by name."""
        if isinstance(options, Deployment):
            return options
        fits = options is None or isinstance(options, Mapping)
        expect(fits, PruningError, "on= a Deployment or its fields by name", got=repr(options))
        given, known = dict(options or {}), [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        expect(not unknown, PruningError, f"on= with fields out of {', '.join(known)}", got=", ".join(unknown))
        return cls(**given)

    @cached_property
    def target(self) -> Target:
        """With all that was left open filled in."""
        assert not isinstance(self.dtype, str)
        return choose_target(self.device, self.dtype, self.backend, self.threads)

    @property
    def table_path(self) -> Path:
        return default_path(self.target, self.batch) if self.table is None else Path(self.table)

    def memory(self, spec: ViTSpec) -> float:
        """Bytes that the runtime holds for weights and buffers."""
        return float(memory_bytes(spec, self.target, self.batch))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what a measured number belongs to."""
        target = self.target
        return {
            "device": str(target.device),
            "backend": target.backend,
            "dtype": str(target.dtype).removeprefix("torch."),
            "threads": target.threads,
            "batch": self.batch,
        }
