"""The native CPU extension as the ops' ``_native`` modules use it: pools, packed weights, buffers as tuples of ints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from ._expect import matrix_of
from .heads import HeadTable
from .op import SHAPES, AnyOp
from .target import BUILD_COMMAND, Launch, MissingExtension, Target, in_order


def extension() -> ModuleType:
    """``prunevit_kernels._cpu``. Raises :class:`MissingExtension` where it is not built."""
    try:
        return import_module("prunevit_kernels._cpu")
    except ModuleNotFoundError as error:
        if error.name != "prunevit_kernels._cpu":
            raise
        message = f"prunevit_kernels._cpu is not built: run `{BUILD_COMMAND}` in the project's folder"
        raise MissingExtension(message) from error


class NativeOp(Generic[AnyOp]):
    """An op packed for the C++ kernels. ``name`` is its function in the extension, ``arguments`` makes what that takes
    after the buffers and the threads.
    """

    name: ClassVar[str]
    arguments: ClassVar[Callable[..., tuple[Any, ...]]]

    def __init__(self, op: AnyOp, target: Target) -> None:
        self.op, self.target = op.to(SHAPES), target

    def bind(self, *buffers: Tensor) -> Launch:
        self.op.check(self.target, *buffers)
        function = getattr(extension(), self.name)
        launch: Launch = function(buffers, self.target.pool, *self.arguments(*buffers))  # it keeps the buffers alive
        return launch


def new_pool(threads: int) -> Any:
    """A thread pool. It starts its threads when it first needs them, and they end with it."""
    return extension().Pool(threads)


def packed_linear(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None = None,
    *,
    reads: Sequence[int] | None = None,
    writes: Sequence[int] | None = None,
    k_start: Sequence[int] = (),
) -> Any:
    """A ``PackedLinear``: the weight copied into panels, bias and γ beside it."""
    w, b, g = (None if t is None else _plain(t) for t in (weight, bias, gamma))
    assert w is not None
    pointers = [0 if t is None else t.data_ptr() for t in (b, g)]
    shape = (w.data_ptr(), *w.shape, w.shape[1])
    return extension().PackedLinear(shape, *pointers, list(reads or ()), list(writes or ()), list(k_start))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def vector(tensor: Tensor | None) -> list[float]:
    """A tensor's values in order; empty for None."""
    values: list[float] = [] if tensor is None else _plain(tensor).flatten().tolist()
    return values


def matrix(name: str, tensor: Tensor) -> tuple[int, int, int, int]:
    """A [B, N, C] buffer with evenly spaced rows, or a [B, C] buffer: address, rows, columns, pitch."""
    rows, pitch = matrix_of(name, tensor) if tensor.dim() == 3 else (tensor.shape[0], tensor.stride(0))
    return tensor.data_ptr(), rows, tensor.shape[-1], pitch


def tokens(tensor: Tensor) -> tuple[int, int, int, int, int, int]:
    """A [B, N, C] buffer: address, sizes, floats from image to image and from row to row."""
    return tensor.data_ptr(), *tensor.shape, tensor.stride(0), tensor.stride(1)


def head_tuples(heads: HeadTable) -> list[tuple[int, ...]]:
    """qk and v width, then the columns of q, k, v and o, for each head."""
    return list(zip(heads.qk_dims, heads.v_dims, heads.q, heads.k, heads.v, heads.o))


def program(launches: Iterable[Launch]) -> Launch:
    """Native launches as one, which runs them in one call without returning to Python in between.

    Other callables may stand among them; every run of native launches becomes one call.
    """
    native = extension()
    parts: list[Launch] = []
    run: list[Launch] = []
    for launch in [*launches, None]:
        if isinstance(launch, native.Launch):
            run.append(launch)
            continue
        if run:
            parts.append(native.Program(run))
            run = []
        if launch is not None:
            parts.append(launch)
    return parts[0] if len(parts) == 1 else in_order(parts)
