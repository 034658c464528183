"""Buffers of the calling thread, and packs bound to them: what a torch.library op runs on."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ._packs import Pack
from .program import fuse
from .target import Launch, Target

MAX_SHAPES = 4  # bound programs a pack keeps for each thread

# name, batch, tokens, width; a width of 0 is a [B, N] buffer of fp32 scores
View = tuple[str, int, int, int]

Programs = OrderedDict[tuple[Any, ...], tuple[Launch, list[Tensor]]]


class _Local(threading.local):
    """Buffers that no other thread or stream sees: nothing needs a lock, and launches on them stay in order."""

    def __init__(self) -> None:
        self.flat: dict[tuple[object, ...], Tensor] = {}
        self.grown = 0
        self.bound: WeakKeyDictionary[Pack, Programs] = WeakKeyDictionary()


_local = _Local()


def _memory(where: tuple[object, ...], view: View, target: Target) -> Tensor:
    name, batch, tokens, width = view
    size = batch * tokens * (target.pitch(width) if width else 1)
    dtype = target.dtype if width else torch.float32
    flat = _local.flat.get((*where, name))
    if flat is None or flat.numel() < size:
        with torch.inference_mode(False):  # made in inference mode, it could not be written outside
            # zeros: what lies between the end of a row and its pitch is defined
            flat = _local.flat[(*where, name)] = torch.zeros(size, dtype=dtype, device=target.device)
        _local.grown += 1  # what was bound to the smaller buffer is bound anew, and the buffer goes
    return flat


def _window(flat: Tensor, view: View, target: Target) -> Tensor:
    _, batch, tokens, width = view
    if not width:
        return flat[: batch * tokens].view(batch, tokens)
    pitch = target.pitch(width)
    return flat[: batch * tokens * pitch].view(batch, tokens, pitch)[..., :width]


def bound(pack: Pack, views: Sequence[View], steps: Sequence[Sequence[int]]) -> tuple[Launch, list[Tensor]]:
    """The pack's ops as one launch, and this thread's buffers that it runs on.

    Op i runs on the views that ``steps[i]`` counts out. What is bound for a shape is kept.
    """
    target = pack.target
    stream = torch.cuda.current_stream(target.device).cuda_stream if target.device.type == "cuda" else 0
    key = (_local.grown, stream, *views)
    programs = _local.bound.setdefault(pack, OrderedDict())
    found = programs.get(key)
    if found is not None:
        programs.move_to_end(key)
        return found
    where = (target.device, target.dtype, stream)
    flats = [_memory(where, view, target) for view in views]
    windows = [_window(flat, view, target) for flat, view in zip(flats, views)]
    launches = [op.bind(*(windows[i] for i in step)) for op, step in zip(pack.value, steps, strict=True)]
    for old in [k for k in programs if k[0] != _local.grown]:
        del programs[old]
    found = programs[(_local.grown, stream, *views)] = fuse(launches, target), windows
    while len(programs) > MAX_SHAPES:
        programs.popitem(last=False)
    return found
