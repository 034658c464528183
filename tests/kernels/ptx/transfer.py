"""Loads, stores and copies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .machine import Array, Block, Copy, Operation, in_window, translates, vector
from .memory import PARAM_WINDOW, SHARED_WINDOW, Fault, aligned
from .parse import Instruction, size_of

SPACES = {"global", "shared", "shared:cta", "param", "const", "local"}


def _space(given: Instruction) -> str:
    found = SPACES & set(given.parts)
    return next(iter(found)).split(":")[0] if found else "generic"


def _count(given: Instruction) -> int:
    return next((int(part[1:]) for part in given.parts if part in ("v2", "v4", "v8")), 1)


def _where(space: str, at: Array) -> tuple[str, Array]:
    """A generic address is of the space whose window it lies in."""
    if space == "generic":
        space = in_window(at)
        at = at - np.uint64({"shared": SHARED_WINDOW}.get(space, 0))
    return space, at


def _elements(space: str, at: Array, size: int, count: int) -> Iterator[tuple[str, Array]]:
    """The space and the addresses of each element of a vector, which is aligned as a whole."""
    here, at = _where(space, at)
    aligned(at, size * count)
    for i in range(count):
        yield here, at + np.uint64(i * size)


@translates("ld", "ldu")
def _load(block: Block, given: Instruction) -> Operation:
    space, count, kind = _space(given), _count(given), given.parts[-1]
    size = size_of(kind)
    dtype = f"{'i' if kind[0] == 's' else 'u'}{size}"
    targets = [block.target(o) for o in vector(given.operands[0])]
    address = block.address(given.operands[1])
    params = np.frombuffer(block.params + bytes(8), np.uint8)

    def load(block: Block, lanes: Array) -> None:
        for to, (here, at) in zip(targets, _elements(space, address(lanes), size, count), strict=True):
            if here == "param":
                offsets = (at - np.uint64(PARAM_WINDOW)).astype(np.int64)
                to(lanes, params[offsets[:, None] + np.arange(size)].view(dtype)[:, 0])
            elif here == "shared":
                to(lanes, block.shared.read(at, dtype))
            elif here == "global":
                to(lanes, block.device(lanes).read(at, dtype))
            else:
                raise Fault(f"{here} memory is not known here")

    return load


@translates("st")
def _store(block: Block, given: Instruction) -> Operation:
    space, count, size = _space(given), _count(given), size_of(given.parts[-1])
    address = block.address(given.operands[0])
    sources = [block.source(o, f"u{8 * size}") for o in vector(given.operands[1])]

    def store(block: Block, lanes: Array) -> None:
        for value, (here, at) in zip(sources, _elements(space, address(lanes), size, count), strict=True):
            if here == "shared":
                block.shared.write(at, value(lanes), lanes)
            elif here == "global":
                block.device(lanes).write(at, value(lanes))
            else:
                raise Fault(f"stores to {here} memory are not known here")

    return store


@translates("prefetch")
def _prefetch(block: Block, given: Instruction) -> Operation:
    """A hint; but an address that is no one's is a mistake."""
    address = block.address(given.operands[0])
    length = block.source(given.operands[1] if len(given.operands) > 1 else "1", "u32")

    def prefetch(block: Block, lanes: Array) -> None:
        for at, size in zip(address(lanes).tolist(), length(lanes).tolist(), strict=True):
            if size < 1:
                raise Fault("a prefetch of nothing")
            block.memory.at(at)
            block.memory.at(at + size - 1)

    return prefetch


@translates("cp")
def _copy(block: Block, given: Instruction) -> Operation:
    if "prefetch" in given.parts:
        return _prefetch(block, given)
    if "bulk" in given.parts:
        return _bulk_copy(block, given)
    if "commit_group" in given.parts:
        return _commit_copies
    if "wait_group" in given.parts or "wait_all" in given.parts:
        pending = int(given.operands[0]) if given.operands else 0
        everything = "wait_all" in given.parts
        return lambda block, lanes: _wait_copies(block, lanes, pending, everything)
    to, source = block.address(given.operands[0]), block.address(given.operands[1])
    size = int(given.operands[2], 0)
    # what lies past the fourth operand's bytes is written as zeros
    take = block.source(given.operands[3] if len(given.operands) > 3 else str(size), "u32")

    def copy(block: Block, lanes: Array) -> None:
        by, at, start, length = lanes.copy(), to(lanes), source(lanes), take(lanes)
        aligned(at, size)
        aligned(start[length > 0], size)
        memory = block.device(lanes)

        def land(threads: Array) -> None:
            rows = np.searchsorted(by, threads)  # lanes are in order
            data, whole = np.zeros((len(rows), size), np.uint8), length[rows] == size
            if whole.any():
                data[whole] = memory.read(start[rows[whole]], f"V{size}").view(np.uint8).reshape(-1, size)
            for row in np.flatnonzero(~whole & (length[rows] > 0)):
                some = np.arange(length[rows[row]], dtype=np.uint64)
                data[row, : len(some)] = memory.read(start[rows[row]] + some, "u1")
            block.shared.replace(at[rows], data)

        if block.timing.late_copies:
            block.copies.append(Copy(lanes.copy(), block.copy_groups[lanes], land))
        else:
            land(lanes)

    return copy


def _commit_copies(block: Block, lanes: Array) -> None:
    block.copy_groups[lanes] += 1


def _wait_copies(block: Block, lanes: Array, pending: int, everything: bool) -> None:
    left = []
    for copy in block.copies:
        done = np.isin(copy.threads, lanes)
        if not everything:
            done &= copy.group < block.copy_groups[copy.threads] - pending
        copy.land(copy.threads[done])
        copy.threads, copy.group = copy.threads[~done], copy.group[~done]
        if len(copy.threads):
            left.append(copy)
    block.copies = left


def _bulk_copy(block: Block, given: Instruction) -> Operation:
    """cp.async.bulk from device to shared memory: its barrier counts the bytes as they land."""
    if "mbarrier:complete_tx:bytes" not in given.parts or "global" not in given.parts:
        raise Fault(f"a bulk copy that this machine does not know: {given.text}")
    to, source, barrier = (block.address(given.operands[i]) for i in (0, 1, 3))
    length = block.source(given.operands[2], "u32")

    def copy(block: Block, lanes: Array) -> None:
        memory = block.device(lanes)
        for at, start, size, key in zip(to(lanes), source(lanes), length(lanes).tolist(), barrier(lanes).tolist()):
            if at % 16 or start % 16 or size % 16 or not size:
                raise Fault(f"a bulk copy of {size} bytes from {start:#x} to {at:#x}: all are multiples of 16")

            def land(at: int = int(at), start: int = int(start), size: int = size, key: int = key) -> None:
                block.shared.write_async(at, memory.read(np.uint64(start) + np.arange(size, dtype=np.uint64), "u1"))
                block.barriers[key].bytes -= size
                block.barriers[key].settle()

            if block.timing.late_copies:
                block.bulk.append((key, land))
            else:
                land()

    return copy


def _matrices(given: Instruction) -> int:
    return int(next(part[1:] for part in given.parts if part in ("x1", "x2", "x4")))


@translates("ldmatrix", "stmatrix")
def _matrix(block: Block, given: Instruction) -> Operation:
    """8 × 8 matrices of 16 bits: thread 8 i + r of a warp has the address of row r of matrix i."""
    loads, count, transposed = given.parts[0] == "ldmatrix", _matrices(given), "trans" in given.parts
    listed, at = given.operands if loads else given.operands[::-1]
    address, names = block.address(at), vector(listed)
    targets = [block.target(name) for name in names] if loads else []
    sources = [] if loads else [block.source(name, "u32") for name in names]
    lane = np.arange(32)
    row, column = (lane % 4 * 2, lane // 4) if transposed else (lane // 4, lane % 4 * 2)

    def cells(addresses: Array, i: int) -> Array:
        """Byte addresses of the two values that each thread holds of matrix i: [warps, 32, 2]."""
        starts = addresses.reshape(-1, 32)[:, 8 * i : 8 * i + 8]
        pair = np.arange(2)
        rows, columns = (row[:, None] + pair, column[:, None] + 0 * pair) if transposed else (
            row[:, None] + 0 * pair, column[:, None] + pair)  # fmt: skip
        return starts[:, rows] + (2 * columns).astype(np.uint64)

    def move(block: Block, lanes: Array) -> None:
        block.warps(lanes)
        addresses = address(lanes)
        aligned(addresses.reshape(-1, 32)[:, : 8 * count], 16)
        for i in range(count):
            at = cells(addresses, i)
            if loads:
                halves = block.shared.read(at.ravel(), "u2").reshape(-1, 2)
                targets[i](lanes, np.ascontiguousarray(halves).view(np.uint32)[:, 0])
            else:
                halves = np.ascontiguousarray(sources[i](lanes)).view(np.uint16)
                block.shared.write(at.ravel(), halves, np.repeat(lanes, 2))

    return move
