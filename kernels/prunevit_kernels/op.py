"""What every op has in common: a contract, a reference, and an implementation for each backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from .target import BackendName, Launch, PackedOp, Target


class Op:
    """An op with its weights, in fp32 and in the shape that mathematics gives them.

    A subclass is a frozen dataclass. ``implementations`` names, for each backend but ``torch``, the module of the
    op's folder whose ``pack(op, target)`` makes the :class:`PackedOp`.
    """

    implementations: ClassVar[Mapping[BackendName, str]] = {"cpu": "_native", "cuda": "_triton"}

    # Each op's ``check(target, *buffers)`` raises ContractError unless the buffers are what its contract says;
    # ``reference(*buffers)`` runs it on them in plain PyTorch. The buffers differ from op to op.
    check: ClassVar[Callable[..., None]]
    reference: ClassVar[Callable[..., None]]

    def to(self, target: Target) -> Self:
        """The same op with its tensors on the target's device, in its dtype."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.detach().to(target.device, target.dtype)
        return dataclasses.replace(self, **moved)  # type: ignore[type-var]

    def pack(self, target: Target) -> PackedOp:
        """Lay the weights out, once, as the target's kernel reads them."""
        if target.backend == "torch":
            return _ReferenceOp(self, target)
        folder = type(self).__module__
        module = import_module(f".{self.implementations[target.backend]}", folder)
        packed: PackedOp = module.pack(self, target)
        return packed


class _ReferenceOp:
    def __init__(self, op: Op, target: Target) -> None:
        self.op, self.target = op.to(target), target

    def bind(self, *buffers: Tensor) -> Launch:
        self.op.check(self.target, *buffers)
        return torch.no_grad()(partial(self.op.reference, *buffers))
