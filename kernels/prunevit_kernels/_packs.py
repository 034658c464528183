"""Packed weights that are never stale: looked up by the tensors they were made from, at every call.

A pack is used only if those tensors still hold the bytes that it was made from. How that is known is the caller's
choice, ``trust_versions``:

``False``: every byte is compared with a copy taken when packing. Whatever wrote to the tensors, and however, is seen.
``True``: the same tensor object, the same memory (held by the cache: its address cannot come back as another's), the
same layout and the same version counter, and no step since of an optimiser of that memory (fused ones count no writes).
PyTorch counts every write through a tensor's own operations, but not those through ``tensor.data``, NumPy or DLPack
views, or another process.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .target import Target

Weights = tuple[Tensor | None, ...]

_memcmp = ctypes.CDLL(None).memcmp  # releases the GIL
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# bytes that a thread of its own compares in a good deal more time than it takes to wake
_WORTH_A_THREAD = 2 << 20

MOST_TARGETS = 2  # that packs of the same tensors are kept for: threads of two counts may take turns
MOST_UNTIED = 64  # packs without tensors: more than a model has blocks

_Run = tuple[int, int, int]  # two addresses, and how many bytes from each


def _dense(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def same_bytes(tensors: Sequence[Tensor], copies: Sequence[Tensor], threads: int = 1) -> bool:
    """Are all tensors, bit for bit, what their copies are? One synchronisation on a GPU."""
    runs: list[_Run] = []
    elsewhere = []
    for tensor, copy in zip(tensors, copies):
        if tensor.shape != copy.shape or tensor.dtype != copy.dtype or tensor.device != copy.device:
            return False
        if _dense(tensor) and _dense(copy):
            runs.append((tensor.data_ptr(), copy.data_ptr(), copy.nbytes))
        else:
            bits = _BITS[tensor.element_size()]
            elsewhere.append((tensor.detach().view(bits) != copy.view(bits)).any())
    return _same_runs(runs, threads) and not (elsewhere and bool(torch.stack(elsewhere).any()))


def _same_runs(runs: Sequence[_Run], threads: int) -> bool:
    """One core reads memory at a part of the rate that two do. PyTorch's own threads would spin on afterwards."""
    total = sum(size for _, _, size in runs)
    threads = min(threads, total // _WORTH_A_THREAD)
    if threads <= 1:
        return _all_same(runs)
    mine, *others = _parts(runs, -(-total // threads))
    try:
        answers = [_readers.submit(_all_same, part) for part in others]
    except RuntimeError:  # the main thread has returned, and executors take no more work
        return _all_same(runs)
    same = _all_same(mine)
    return all([same, *(answer.result() for answer in answers)])


def _all_same(runs: Sequence[_Run]) -> bool:
    return all(_memcmp(*run) == 0 for run in runs)


def _new_readers() -> None:
    """Threads that wait for bytes to compare: to start one for each block took a fifth of the comparison's time."""
    global _readers
    _readers = ThreadPoolExecutor(os.cpu_count(), "prunevit-compare")


_readers: ThreadPoolExecutor
_new_readers()
os.register_at_fork(after_in_child=_new_readers)  # the threads do not survive a fork


def _parts(runs: Sequence[_Run], limit: int) -> list[list[_Run]]:
    """The runs, cut into parts of ``limit`` bytes."""
    parts: list[list[_Run]] = [[]]
    room = limit
    for first, second, size in runs:
        done = 0
        while done < size:
            if not room:
                parts.append([])
                room = limit
            count = min(room, size - done)
            parts[-1].append((first + done, second + done, count))
            done, room = done + count, room - count
    return parts


class _OptimiserSteps:
    """How many steps the optimisers of this process have made on a parameter's memory, once somebody wants to know."""

    def __init__(self) -> None:
        self._on: Counter[int] = Counter()  # by address
        self._unknown = 0
        self._watching = False

    def on(self, tensor: Tensor) -> int:
        return self._unknown + self._on[tensor.untyped_storage().data_ptr()]

    def watch(self) -> None:
        if not self._watching:
            self._watching = True
            register_optimizer_step_post_hook(self._stepped)

    def _stepped(self, optimiser: torch.optim.Optimizer, *_: object) -> None:
        for parameter in (p for group in optimiser.param_groups for p in group["params"]):
            if type(parameter) in (Tensor, torch.nn.Parameter) and parameter.layout is torch.strided:
                self._on[parameter.untyped_storage().data_ptr()] += 1
            else:  # whose memory may be that of others, or which has no storage to ask
                self._unknown += 1


optimiser_steps = _OptimiserSteps()


class Pack:
    """``value`` = ``make(target, *weights)``, and how to tell whether those weights have changed since."""

    def __init__(self, weights: Weights, target: Target, make: Callable[..., Any], trust: bool) -> None:
        self.target, self.addresses = target, _addresses(weights)
        tensors = [w for w in weights if w is not None]
        if trust and tensors:
            optimiser_steps.watch()
        # read before the weights are: a write that comes in between makes this pack old, not wrong
        self.stamps = [_stamp(t) for t in tensors] if trust and not any(t.is_inference() for t in tensors) else None
        self.held = [t.untyped_storage() for t in tensors] if self.stamps is not None else []
        with torch.inference_mode(False), torch.no_grad():
            copied = [None if w is None else w.detach().clone() for w in weights]
            self.value = make(target, *copied)
        self.copies = None if self.stamps is not None else [c for c in copied if c is not None]
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)  # callers on other streams may use it at once

    def is_of(self, weights: Weights) -> bool:
        tensors = [w for w in weights if w is not None]
        if self.copies is not None:
            return same_bytes(tensors, self.copies, self.target.threads)
        return not any(t.is_inference() for t in tensors) and [_stamp(t) for t in tensors] == self.stamps


def _addresses(weights: Weights) -> list[int | None]:
    return [None if w is None else w.data_ptr() for w in weights]


def _stamp(tensor: Tensor) -> tuple[object, ...]:
    layout = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
    return (optimiser_steps.on(tensor), tensor._version, *layout)


def _tied_to(tensor: Tensor, compared: bool) -> Any:
    """What an entry lives as long as: a tensor; of a parameter whose contents are compared, its memory.

    PyTorch swaps no parameter that has weak references (``set_swap_module_params_on_conversion``).
    """
    return tensor.untyped_storage() if compared and isinstance(tensor, torch.nn.Parameter) else tensor


class PackCache:
    """Packs by the identity of the tensors they come from. Thread-safe.

    An entry goes when one of its tensors does, or when their memory has been packed twice since, for other targets such
    as thread counts, or of other parameters. Of packs without tensors the last ones stay.
    """

    def __init__(self) -> None:
        self._packs: dict[tuple[Hashable, ...], tuple[Pack, list[Any]]] = {}
        self._lock = threading.RLock()
        self.made = 0
        _caches.add(self)

    def __len__(self) -> int:
        return len(self._packs)

    def get(
        self,
        kind: Hashable,
        weights: Weights,
        target: Target,
        make: Callable[..., Any],
        *,
        trust_versions: bool,
    ) -> Pack:
        """The pack whose ``make`` lays copies of the weights out; ``kind`` has all that it depends on besides."""
        key = (kind, target, trust_versions, *map(id, weights))
        entry = self._packs.get(key)
        if entry is not None and entry[0].is_of(weights):
            return entry[0]
        with self._lock:  # whoever waited here may find the pack made
            entry = self._packs.get(key)
            if entry is not None and entry[0].is_of(weights):
                return entry[0]
            # an old pack's memory is free before the new one asks for as much
            self._packs.pop(key, None)
            del entry
            pack = self._shared(key, weights)
            if pack is None:
                pack = Pack(weights, target, make, trust_versions)
                self.made += 1
            # no lock in the callback: it may run in the middle of anything, and pop is atomic
            forget = partial(_forget, weakref.ref(self), key)
            tied = [_tied_to(w, pack.copies is not None) for w in weights if w is not None]
            self._packs[key] = pack, [weakref.ref(one, forget) for one in tied]
            self._leave_out(key, weights)
            return pack

    def _shared(self, key: tuple[Hashable, ...], weights: Weights) -> Pack | None:
        """One made of other parameters on the same memory: only contents say that it is of these too."""
        packs = [pack for known, pack in self._of_memory(key, weights) if known[1] == key[1]]
        return next((pack for pack in packs if pack.copies is not None and pack.is_of(weights)), None)

    def _leave_out(self, key: tuple[Hashable, ...], weights: Weights) -> None:
        """Entries beside a new one that would otherwise stay for as long as their tensors, or for ever."""
        same = [known for known, _ in self._of_memory(key, weights)]
        untied = [known for known in list(self._packs) if all(one == id(None) for one in known[3:])]
        for old in same[:-MOST_TARGETS] + untied[:-MOST_UNTIED]:
            self._packs.pop(old, None)

    def _of_memory(self, key: tuple[Hashable, ...], weights: Weights) -> list[tuple[tuple[Hashable, ...], Pack]]:
        """Entries of the same tensors or of others on their memory, for any target; the last made comes last."""
        kind, _, trusted, *ids = key
        where = _addresses(weights)
        # keys alone: a list of items makes tuples, whose making may collect garbage, whose end takes entries away
        alike = [known for known in list(self._packs) if known[0] == kind and known[2] == trusted]
        entries = [(known, entry[0]) for known in alike if (entry := self._packs.get(known)) is not None]
        return [(known, pack) for known, pack in entries if list(known[3:]) == ids or pack.addresses == where]

    def drop(self, tensors: Iterable[Tensor]) -> None:
        """Every pack of any of these."""
        gone = set(map(id, tensors))
        for key in list(self._packs):
            if not gone.isdisjoint(key[3:]):
                self._packs.pop(key, None)

    def clear(self) -> None:
        with self._lock:
            self._packs.clear()


def _renew_locks() -> None:
    """A child has no other thread: whoever was packing in the parent will not give its lock back here."""
    for cache in _caches:
        cache._lock = threading.RLock()


_caches: weakref.WeakSet[PackCache] = weakref.WeakSet()
os.register_at_fork(after_in_child=_renew_locks)


def _forget(cache: weakref.ref[PackCache], key: tuple[Hashable, ...], _: object) -> None:
    alive = cache()
    if alive is not None:
        alive._packs.pop(key, None)
