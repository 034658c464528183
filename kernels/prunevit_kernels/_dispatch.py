"""What the torch.library ops share: which target serves a tensor, its packs, and running them on buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.library import CustomOpDef  # type: ignore[attr-defined]  # torch documents it there

from ._expect import ContractError, expect
from ._packs import Pack, PackCache, Weights
from ._workspace import View, bound
from .op import Op
from .target import BackendName, PackedOp, Target, kernel_backend

packs = PackCache()
plain: dict[str, Callable[..., Any]] = {}

# how an op finds its pack: the last two arguments of those that take weights
HOW = 'str backend="auto", bool trust_versions=False'


@lru_cache(4)  # a thread count that is asked for no more need not keep its threads
def _target(backend: BackendName, device: torch.device, dtype: torch.dtype, threads: int) -> Target:
    return Target(backend, device, dtype, threads)  # one object for each: packs of one target share its thread pool


def target_of(x: Tensor, backend: str) -> Target:
    """Where an op on x runs."""
    name: Any = kernel_backend(x.device, x.dtype) if backend == "auto" else backend
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    expect(not capturing, "no CUDA graph capture: a replay would not see that weights have changed", got="a capture")
    threads = torch.get_num_threads() if name == "cpu" else 1
    return _target(name, x.device, x.dtype, threads)


def packed(
    kind: tuple[object, ...],
    x: Tensor,
    weights: Weights,
    backend: str,
    trust_versions: bool,
    make: Callable[..., Sequence[Op]],
) -> Pack:
    """The pack for x's device and dtype. ``kind`` names the op with all that ``make`` depends on besides weights."""
    for weight in weights:
        if weight is not None and weight.device != x.device:
            raise ContractError(f"expected weights on x's device ({x.device}), got {weight.device}")

    def lay_out(target: Target, *copies: Tensor | None) -> list[PackedOp]:
        return [op.pack(target) for op in make(target, *copies)]

    return packs.get(kind, weights, target_of(x, backend), lay_out, trust_versions=trust_versions)


def run(pack: Pack, views: Sequence[View], steps: Sequence[Sequence[int]], inputs: dict[int, Tensor | None]) -> Any:
    """Copy inputs (None: zeros) into their buffers and run; the buffers still hold the results."""
    launch, windows = bound(pack, views, steps)
    for index, tensor in inputs.items():
        if tensor is None:
            windows[index].zero_()
        else:
            copy_into(windows[index], tensor)
    launch()
    return windows


def owned(window: Tensor) -> Tensor:
    """A copy that belongs to the caller."""
    out = torch.empty(window.shape, dtype=window.dtype, device=window.device)
    copy_into(out, window)
    return out


def copy_into(to: Tensor, source: Tensor) -> None:
    """``to.copy_(source)``, on this thread alone.

    On a CPU, PyTorch copies on all of its threads, which go on spinning for milliseconds afterwards, on the cores that
    the kernels' own threads need next.
    """
    if to.device.type == "cpu" and to.dtype == source.dtype == torch.float32 and not source.is_neg():
        np.copyto(to.detach().numpy(), source.detach().numpy())
    else:
        to.copy_(source)


def register(schema: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register a function as ``prunevit::`` its name; ``plain`` keeps it as it is."""

    def under_its_name(function: Callable[..., Any]) -> CustomOpDef:
        plain[function.__name__] = function
        name = f"prunevit::{function.__name__}"
        # a captured CUDA graph would freeze the pack: inductor leaves the op out of its captures
        tags = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
        return torch.library.custom_op(name, function, mutates_args=mutates, schema=schema, tags=tags)

    return under_its_name
