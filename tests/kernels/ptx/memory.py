"""Device, shared and parameter memory of the machine. Every access is checked: bounds, alignment, space."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

SHARED_WINDOW = 1 << 60  # where generic addresses show shared memory
PARAM_WINDOW = 1 << 61
SHARED_BASE = 1024  # the first kilobyte of a block belongs to the system

Array = np.ndarray


class Fault(Exception):
    """What a GPU or its sanitizer would stop for."""


@dataclass(frozen=True)
class Allocation:
    name: str
    base: int
    data: Array  # bytes
    constant: bool = False

    @property
    def end(self) -> int:
        return self.base + len(self.data)


@dataclass
class DeviceMemory:
    """The memory of host tensors, at the addresses where they are."""

    allocations: list[Allocation] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor, constant: bool = False) -> None:
        """The storage of a tensor; views of one storage count once. No launch writes what is ``constant``."""
        storage = tensor.untyped_storage()
        base, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or any(known.base == base for known in self.allocations):
            return
        data = np.frombuffer((ctypes.c_uint8 * size).from_address(base), np.uint8)
        self.allocations = sorted([*self.allocations, Allocation(name, base, data, constant)], key=lambda a: a.base)

    def before_waiting(self) -> DeviceMemory:
        """What a launch may touch while the one ahead of it still runs: it may read what none writes."""
        return Constants([held for held in self.allocations if held.constant])

    def at(self, address: int) -> Allocation:
        place = bisect_right([a.base for a in self.allocations], address) - 1
        if place < 0 or address >= self.allocations[place].end:
            raise Fault(f"no allocation at {address:#x}")
        return self.allocations[place]

    def _cells(self, addresses: Array, size: int) -> tuple[Allocation, Array]:
        """The allocation that all addresses lie in, seen as cells of ``size`` bytes, and which ones they are."""
        low, high = int(addresses.min()), int(addresses.max())
        allocation = self.at(low)
        if high + size > allocation.end:
            raise Fault(f"{size} bytes at {high:#x}, past the end of {allocation.name} at {allocation.end:#x}")
        return allocation, (addresses - np.uint64(allocation.base)).astype(np.int64)

    def read(self, addresses: Array, kind: str) -> Array:
        size = np.dtype(kind).itemsize
        try:
            allocation, offsets = self._cells(addresses, size)
        except Fault:
            if len(addresses) == 1:
                raise
            return np.concatenate([self.read(addresses[i : i + 1], kind) for i in range(len(addresses))])
        return gather(allocation.data, offsets, kind)

    def write(self, addresses: Array, values: Array) -> None:
        try:
            allocation, offsets = self._cells(addresses, values.dtype.itemsize)
        except Fault:
            if len(addresses) == 1:
                raise
            for i in range(len(addresses)):
                self.write(addresses[i : i + 1], values[i : i + 1])
            return
        scatter(allocation.data, offsets, values)


class Constants(DeviceMemory):
    """What may be read before griddepcontrol.wait; nothing may be written."""

    def at(self, address: int) -> Allocation:
        try:
            return super().at(address)
        except Fault:
            raise Fault(f"{address:#x} is read before griddepcontrol.wait: an earlier launch may write it") from None

    def write(self, addresses: Array, values: Array) -> None:
        raise Fault(f"{int(addresses.min()):#x} is written before griddepcontrol.wait")


def gather(data: Array, offsets: Array, kind: str) -> Array:
    size = np.dtype(kind).itemsize
    cells = data[offsets[:, None] + np.arange(size)]
    return cells.view(kind)[:, 0]


def scatter(data: Array, offsets: Array, values: Array) -> None:
    size = values.dtype.itemsize
    data[offsets[:, None] + np.arange(size)] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)


class SharedMemory:
    """A block's. Fresh bytes are NaN in every format.

    The asynchronous proxy (tensor cores of sm_90, bulk copies) does not see what threads store until a
    ``fence.proxy.async`` of theirs, or of a thread that has met them at a barrier since. ``unpublished`` says of each
    byte which thread stored it (1 and up), or that it has been at a barrier with it (−1), or that it is published (0).
    """

    def __init__(self, size: int) -> None:
        self.data = np.full(size, 0xFF, np.uint8)
        self.unpublished = np.zeros(size, np.int16)

    def offsets(self, addresses: Array, size: int) -> Array:
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if offsets.size and (offsets.min() < 0 or offsets.max() + size > len(self.data)):
            raise Fault(f"{size} bytes of shared memory at {int(offsets.max())} of {len(self.data)}")
        return offsets

    def read(self, addresses: Array, kind: str) -> Array:
        return gather(self.data, self.offsets(addresses, np.dtype(kind).itemsize), kind)

    def write(self, addresses: Array, values: Array, threads: Array) -> None:
        offsets = self.offsets(addresses, values.dtype.itemsize)
        scatter(self.data, offsets, values)
        self.unpublished[offsets[:, None] + np.arange(values.dtype.itemsize)] = (threads + 1)[:, None]

    def _stored_by(self, marks: Array) -> Array:
        held = np.flatnonzero(self.unpublished)
        return held[np.isin(self.unpublished[held], marks)]

    def met(self, threads: Array) -> None:
        """These threads have met at a barrier."""
        self.unpublished[self._stored_by(threads + 1)] = -1

    def publish(self, threads: Array) -> None:
        """fence.proxy.async by these threads."""
        self.unpublished[self._stored_by(np.append(threads + 1, -1))] = 0

    def read_async(self, addresses: Array, kind: str) -> Array:
        """Through the asynchronous proxy."""
        size = np.dtype(kind).itemsize
        offsets = self.offsets(addresses.ravel(), size)
        if self.unpublished[offsets].any():
            raise Fault("the asynchronous proxy reads what was stored without fence.proxy.async")
        return gather(self.data, offsets, kind).reshape(addresses.shape)

    def replace(self, addresses: Array, data: Array) -> None:
        """By asynchronous copies of threads: rows of bytes. Whoever waits for them orders them before the products."""
        at = self.offsets(addresses, data.shape[1])[:, None] + np.arange(data.shape[1])
        self.data[at] = data
        self.unpublished[at] = 0

    def write_async(self, address: int, data: Array) -> None:
        (offset,) = self.offsets(np.array([address]), len(data))
        self.data[offset : offset + len(data)] = data
        self.unpublished[offset : offset + len(data)] = 0


def aligned(addresses: Array, size: int) -> None:
    if addresses.size and (addresses % np.uint64(size)).any():
        raise Fault(f"an access of {size} bytes at {int(addresses.max()):#x}, which is no multiple of it")
