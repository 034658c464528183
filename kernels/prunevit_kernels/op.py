"""What every op has in common: a contract, a reference, and an implementation for each backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from .target import BackendName, Launch, PackedOp, Target

# an op moved here keeps its tensors' shapes alone: what is left of it once its weights are packed
SHAPES = Target("torch", torch.device("meta"))

MODULES: dict[BackendName, str] = {"cpu": "._native", "cuda": "._triton"}


class Op:
    """An op with its weights, in fp32 and in the shape that mathematics gives them.

    A subclass is a frozen dataclass. For each backend but ``torch`` a module of the op's folder has a class ``Packed``,
    whose ``Packed(op, target)`` is the :class:`PackedOp`.
    """

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
        packed: PackedOp = import_module(MODULES[target.backend], type(self).__module__).Packed(self, target)
        return packed


class _ReferenceOp:
    def __init__(self, op: Op, target: Target) -> None:
        self.op, self.target = op.to(target), target

    def bind(self, *buffers: Tensor) -> Launch:
        self.op.check(self.target, *buffers)
        # the target says the dtype: a caller's autocast does not
        exact = torch.autocast(self.target.device.type, enabled=False)
        launch: Launch = torch.no_grad()(exact(partial(self.op.reference, *buffers)))
        return launch


AnyOp = TypeVar("AnyOp", bound=Op)
