"""Tensor cores: mma.sync m16n8k16, and wgmma m64nNk16 with operands in registers or behind descriptors.

Layouts are those of the PTX manual: thread ``4 g + t`` of a warp holds rows g and g + 8, and columns 2 t and 2 t + 1
of every eight.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .machine import Array, Block, Operation, translates, vector
from .memory import Fault
from .parse import Instruction
from .values import from_half, immediate


def _halves(bits: Array, kind: str) -> Array:
    """32-bit registers as pairs of fp32: [..., 2]."""
    return from_half(np.ascontiguousarray(bits)[..., None].view(np.uint16), kind)


def _a_tile(registers: list[Array], kind: str) -> Array:
    """Four registers of each thread: [warps, 16, 16]."""
    values = _halves(np.stack([r.reshape(-1, 8, 4) for r in registers]), kind)  # register, warp, g, t, pair
    low = np.concatenate([values[0], values[1]], axis=1).reshape(-1, 16, 8)
    high = np.concatenate([values[2], values[3]], axis=1).reshape(-1, 16, 8)
    return np.concatenate([low, high], axis=2)


def _accumulators(registers: list[Array]) -> Array:
    """2 rows × 2 columns of every eight columns, four registers a time: [warps, 16, 8 · count / 4]."""
    values = np.stack(registers, -1).view(np.float32).reshape(-1, 8, 4, len(registers) // 4, 2, 2)
    return values.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 2 * len(registers))


def _into_registers(tile: Array) -> list[Array]:
    warps, _, columns = tile.shape
    values = tile.reshape(warps, 2, 8, columns // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5)
    flat = np.ascontiguousarray(values.reshape(warps * 32, columns // 2), np.float32).view(np.uint32)
    return [flat[:, i] for i in range(columns // 2)]


@translates("mma")
def _mma(block: Block, given: Instruction) -> Operation:
    if "m16n8k16" not in given.parts or given.parts[-1] != "f32":
        raise Fault(f"a product that this machine does not know: {given.text}")
    kind = given.parts[-2]
    targets = [block.target(o) for o in vector(given.operands[0])]
    a, b, c = ([block.source(o, "u32") for o in vector(operand)] for operand in given.operands[1:4])

    def multiply(block: Block, lanes: Array) -> None:
        block.warps(lanes)
        left = _a_tile([read(lanes) for read in a], kind)
        values = _halves(
            np.stack([read(lanes).reshape(-1, 8, 4) for read in b], axis=2), kind
        )  # warp, n, k / 8, t, pair
        right = values.reshape(-1, 8, 16)
        sums = _accumulators([read(lanes) for read in c]) + left @ right.transpose(0, 2, 1)
        for to, value in zip(targets, _into_registers(sums)):
            to(lanes, value)

    return multiply


SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a row within which 16-byte pieces change places


def shared_tile(block: Block, descriptor: int, rows: int, kind: str, transposed: bool) -> Array:
    """[rows, 16] of an operand of wgmma: K-major, or, transposed, with rows next to one another in memory.

    A descriptor has a start address, two strides and a swizzle. A swizzled operand is made of pieces of eight rows of
    128, 64 or 32 bytes; the second stride leads to the next eight rows (or, transposed, the next eight along K), the
    first one (transposed only) to the next stretch of a row's bytes.
    """
    start = (descriptor & 0x3FFF) << 4
    leading, stride = ((descriptor >> 16) & 0x3FFF) << 4, ((descriptor >> 32) & 0x3FFF) << 4
    width = SWIZZLES[descriptor >> 62]
    if (descriptor >> 49) & 7 or not width:
        raise Fault(f"descriptor {descriptor:#x}: a base offset, or no swizzle, is not known here")
    row, k = np.arange(rows)[:, None], np.arange(16)[None, :]
    if transposed:
        across = width // 2  # elements in a stretch
        at = start + row // across * leading + k // 8 * stride + k % 8 * width + row % across * 2
    else:
        at = start + row // 8 * stride + row % 8 * width + k * 2
    # the pattern repeats every eight rows: address bits 7 … 9 change bits 4 …
    at = at ^ ((at >> 7 & (width // 16 - 1)) << 4)
    return from_half(block.shared.read_async(at.astype(np.uint64), "u2"), kind)


@translates("wgmma")
def _wgmma(block: Block, given: Instruction) -> Operation:
    if "fence" in given.parts:
        return lambda block, lanes: None
    if "commit_group" in given.parts:
        return _commit
    if "wait_group" in given.parts:
        pending = int(given.operands[0])
        return lambda block, lanes: _wait(block, lanes, pending)
    shape, kind = given.parts[4], given.parts[-1]
    columns = int(shape.split("n")[1].split("k")[0])
    if not shape.startswith("m64") or not shape.endswith("k16") or given.parts[5] != "f32":
        raise Fault(f"a product that this machine does not know: {given.text}")
    names = vector(given.operands[0])
    if len(names) != columns // 2:
        raise Fault(f"{len(names)} accumulators for {columns} columns")
    own, targets = [block.source(o, "u32") for o in names], [block.target(o) for o in names]
    in_registers = given.operands[1].startswith("{")
    a = [block.source(o, "u32") for o in vector(given.operands[1])] if in_registers else []
    a_descriptor = None if in_registers else block.source(given.operands[1], "u64")
    b_descriptor = block.source(given.operands[2], "u64")
    adds = _flag(block, given.operands[3])
    signs = [immediate(o) for o in given.operands[4:6]]
    turned = [immediate(o) == 1 for o in given.operands[6:]]
    if signs != [1, 1]:
        raise Fault("negated operands are not known here")

    def multiply(block: Block, lanes: Array) -> None:
        for warp in block.warps(lanes):
            threads = warp * 32 + np.arange(32)
            # addresses and flags are read now; registers and shared memory when the product is made
            right_at = int(b_descriptor(threads)[0])
            left_at = int(a_descriptor(threads)[0]) if a_descriptor else 0
            accumulate = bool(adds(threads)[0])

            def product(
                threads: Array = threads, warp: int = int(warp), right_at: int = right_at, left_at: int = left_at,
                accumulate: bool = accumulate,
            ) -> None:  # fmt: skip
                right = shared_tile(block, right_at, columns, kind, turned[-1])
                if in_registers:
                    left = _a_tile([read(threads) for read in a], kind)[0]
                else:
                    left = shared_tile(block, left_at, 64, kind, turned[0])[warp % 4 * 16 :][:16]
                sums = (left @ right.T)[None]
                if accumulate:
                    sums = sums + _accumulators([read(threads) for read in own])
                for to, value in zip(targets, _into_registers(sums)):
                    to(threads, value)

            if block.timing.late_products:
                block.products[warp].append(product)
            else:
                product()

    return multiply


def _flag(block: Block, operand: str) -> Callable[[Array], Array]:
    value = immediate(operand)
    if value is not None:
        return lambda lanes: np.full(len(lanes), bool(value))
    return block.source(operand, "pred")


def _commit(block: Block, lanes: Array) -> None:
    for warp in block.warps(lanes):
        block.product_groups[warp].append(block.products[warp])
        block.products[warp] = []


def _wait(block: Block, lanes: Array, pending: int) -> None:
    for warp in block.warps(lanes):
        groups = block.product_groups[warp]
        while len(groups) > pending:
            for product in groups.popleft():
                product()
