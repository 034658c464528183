"""A block of threads that executes PTX on a CPU, warps in any order, asynchronous work as early or late as allowed.

Threads have program counters of their own. Of a warp, those furthest back run first, so that branches rejoin. What is
issued asynchronously (cp.async, bulk copies, wgmma) takes effect at once or when it is waited for; warps run together
or in a drawn order. A kernel that synchronises as PTX demands gives the same result in every case.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import PARAM_WINDOW, SHARED_BASE, SHARED_WINDOW, DeviceMemory, Fault, SharedMemory
from .parse import Instruction, Kernel, size_of
from .values import BITS, immediate, numpy_type

Array = np.ndarray
READY, WAITING, GONE = 0, 1, 2


@dataclass(frozen=True)
class Timing:
    """When things happen that PTX leaves open."""

    late_copies: bool = False
    """Asynchronous copies take effect when they are waited for, not when they are issued."""
    late_products: bool = False
    """So do wgmma's products: with copies at once, what overwrites an operand that is still being read shows."""
    order: int | None = None
    """A seed for the order of warps; None: all warps at one place run together."""


@dataclass
class MBarrier:
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.expected


@dataclass
class Copy:
    """A cp.async of some threads, not yet visible."""

    threads: Array
    group: Array
    land: Callable[[Array], None]


Operation = Callable[["Block", Array], None]
Translate = Callable[["Block", Instruction], Operation]


@dataclass
class Block:
    """One thread block of one kernel."""

    kernel: Kernel
    memory: DeviceMemory
    params: bytes
    index: tuple[int, int, int]
    grid: tuple[int, int, int]
    shared_bytes: int
    threads: int
    timing: Timing
    executed: Counter[str] = field(default_factory=Counter)
    """Instructions issued by warps, by the first word of the opcode."""

    def __post_init__(self) -> None:
        count = self.threads
        self.symbols, static = self._place_variables()
        self.shared = SharedMemory(static + self.shared_bytes)
        self.registers: dict[str, Array] = {}
        self.pc = np.zeros(count, np.int64)
        self.state = np.zeros(count, np.int8)
        self.special = self._special_registers()
        self.named: dict[int, list[tuple[Array, int]]] = {}
        self.barriers: dict[int, MBarrier] = {}
        self.copies: list[Copy] = []
        self.copy_groups = np.zeros(count, np.int64)
        self.bulk: deque[tuple[int, Callable[[], None]]] = deque()
        warps = count // 32
        self.products: list[list[Callable[[], None]]] = [[] for _ in range(warps)]
        self.product_groups: list[deque[list[Callable[[], None]]]] = [deque() for _ in range(warps)]
        self.random = None if self.timing.order is None else np.random.default_rng(self.timing.order)
        self.operations: list[Operation | None] = [None] * len(self.kernel.code)
        self.stops = set(self.kernel.labels.values())
        self.waited = np.full(count, not self.kernel.overlaps)
        self.constants = self.memory.before_waiting() if self.kernel.overlaps else self.memory

    def _place_variables(self) -> tuple[dict[str, int], int]:
        """Shared variables one after another, dynamic memory last; parameters by their offsets."""
        at, symbols = 0, {p.name: PARAM_WINDOW + p.offset for p in self.kernel.params}
        for name, (space, align, size) in sorted(self.kernel.variables.items(), key=lambda item: item[1][2] == 0):
            if space == "shared":
                at = -(-at // align) * align
                symbols[name] = SHARED_BASE + at
                at += size
        return symbols, at

    # registers and operands

    def register(self, name: str) -> Array:
        found = self.registers.get(name)
        if found is None:
            family = name.rstrip("0123456789")
            kind = self.kernel.registers.get(name) or self.kernel.registers[family]
            dtype = np.bool_ if kind == "pred" else BITS[size_of(kind)]
            # what nothing has written is as wrong as can be
            found = np.full(self.threads, True if kind == "pred" else np.iinfo(dtype).max, dtype)
            self.registers[name] = found
        return found

    def source(self, operand: str, kind: str) -> Callable[[Array], Array]:
        """Reads an operand as a type: a register, a literal, a special register or the address of a symbol."""
        dtype = numpy_type(kind) if kind != "pred" else np.dtype(bool)
        value = immediate(operand)
        if value is not None:
            if isinstance(value, int) and dtype.kind in "iu":
                value &= (1 << 8 * dtype.itemsize) - 1
                constant = np.array([value], BITS[dtype.itemsize]).view(dtype)[0]
            elif isinstance(value, float) and dtype.kind == "u":  # a float's bits moved as bits
                constant = np.array([value], f"f{dtype.itemsize}").view(dtype)[0]
            else:
                constant = dtype.type(value)
            return lambda lanes: np.full(len(lanes), constant, dtype)
        if operand in self.special:
            special = self.special[operand].astype(dtype)
            return lambda lanes: special[lanes]
        if operand in self.symbols:
            return lambda lanes: np.full(len(lanes), self.symbols[operand], np.uint64).astype(dtype)
        held = self.register(operand)
        if held.dtype == np.bool_ or held.dtype.itemsize == dtype.itemsize:
            return (lambda lanes: held[lanes]) if held.dtype == dtype else (lambda lanes: held[lanes].view(dtype))
        if dtype.kind not in "iu":
            raise Fault(f"{operand} has {held.dtype.itemsize} bytes, read as {kind}")
        return lambda lanes: held[lanes].astype(BITS[dtype.itemsize]).view(dtype)

    def _special_registers(self) -> dict[str, Array]:
        threads, ones = np.arange(self.threads), np.ones(self.threads, np.uint32)
        known = {"%tid.x": threads, "%ntid.x": self.threads * ones, "%laneid": threads % 32, "WARP_SZ": 32 * ones}
        for axis, place, count in zip("xyz", self.index, self.grid):
            known |= {f"%ctaid.{axis}": place * ones, f"%nctaid.{axis}": count * ones}
        return known

    def target(self, operand: str) -> Callable[[Array, Array], None]:
        """Writes bits to a register of whatever width; ``_`` takes nothing."""
        if operand == "_":
            return lambda lanes, value: None
        held = self.register(operand)

        def write(lanes: Array, value: Array) -> None:
            if held.dtype == np.bool_:
                held[lanes] = value
                return
            value = np.ascontiguousarray(value)
            if value.dtype.itemsize != held.dtype.itemsize:  # a narrow load fills a wide register
                wide = f"{'i' if value.dtype.kind == 'i' else 'u'}{held.dtype.itemsize}"
                value = value.astype(wide)
            held[lanes] = value.view(held.dtype)

        return write

    def address(self, operand: str) -> Callable[[Array], Array]:
        """``[register + offset]`` or ``[symbol + offset]``."""
        inner = operand.strip()[1:-1]
        base, _, offset = inner.partition("+")
        shift = np.uint64(int(offset, 0) & ((1 << 64) - 1)) if offset.strip() else np.uint64(0)
        base = base.strip()
        if base in self.symbols:
            start = np.uint64(self.symbols[base]) + shift
            return lambda lanes: np.full(len(lanes), start, np.uint64)
        number = immediate(base)
        if number is not None:
            return lambda lanes: np.full(len(lanes), np.uint64(int(number)) + shift, np.uint64)
        held = self.register(base)
        if held.dtype.itemsize == 4:  # a 32-bit shared address wraps at 32 bits
            return lambda lanes: (held[lanes] + shift.astype(np.uint32)).astype(np.uint64)
        return lambda lanes: held[lanes] + shift

    # running

    def run(self, limit: int = 3_000_000) -> None:
        """Until every thread has returned."""
        with np.errstate(all="ignore"):
            for _ in range(limit):
                ready = self.state == READY
                if not ready.any():
                    if (self.state == GONE).all():
                        self._leave_nothing_behind()
                        return
                    raise Fault(f"deadlock: threads wait at barriers {sorted(self.named)}")
                first = np.where(ready, self.pc, np.iinfo(np.int64).max).reshape(-1, 32).min(1)
                for place in self._places(first):
                    chosen = np.repeat(place[1], 32)
                    self._stretch(np.flatnonzero(ready & chosen & (self.pc == place[0])))
        raise Fault(f"no end after {limit} stretches")

    def _places(self, first: Array) -> list[tuple[int, Array]]:
        """Where to go on, and with which warps."""
        active = first < np.iinfo(np.int64).max
        if self.random is not None:
            # one warp, or now and then a warpgroup's worth, so that others fall behind
            drawn = self.random.permutation(np.flatnonzero(active))[: int(self.random.integers(1, 5))]
            only = np.zeros_like(active)
            only[drawn] = True
            active &= only
        return [(int(pc), active & (first == pc)) for pc in np.unique(first[active])]

    def _stretch(self, lanes: Array) -> None:
        """These threads, all at one place, up to the next branch, barrier or label."""
        pc, warps = int(self.pc[lanes[0]]), len(np.unique(lanes // 32))
        while True:
            instruction = self.kernel.code[pc] if pc < len(self.kernel.code) else None
            if instruction is None:
                self.state[lanes] = GONE
                return
            operation = self.operations[pc]
            if operation is None:
                operation = self.operations[pc] = translate(self, instruction)
            active = lanes
            if instruction.guard is not None:
                held = self.register(instruction.guard)[lanes]
                active = lanes[~held if instruction.negated else held]
            self.pc[lanes] = pc + 1
            if len(active):
                try:
                    operation(self, active)
                except Fault as fault:
                    raise Fault(f"{self.kernel.name}, block {self.index}: {instruction.text}: {fault}") from None
                self.executed[instruction.parts[0]] += warps if active is lanes else len(np.unique(active // 32))
            pc += 1
            if instruction.parts[0] in MOVES or pc in self.stops:
                return

    def _leave_nothing_behind(self) -> None:
        if any(self.products) or any(self.product_groups) or self.bulk:
            raise Fault(f"{self.kernel.name} returned before its asynchronous work was waited for")

    def device(self, lanes: Array) -> DeviceMemory:
        """Device memory, as far as these threads may touch it now."""
        return self.memory if self.waited[lanes].all() else self.constants

    def warps(self, lanes: Array) -> Array:
        """Their warps; an ``.aligned`` instruction wants them whole."""
        if len(lanes) % 32 or (lanes.reshape(-1, 32) != lanes[::32, None] + np.arange(32)).any():
            raise Fault(f"a warp's threads are not together: {len(lanes)} of them, from {lanes[0]}")
        return lanes[::32] // 32


MOVES = ("bra", "brx", "bar", "barrier", "ret", "exit", "mbarrier")

TRANSLATIONS: dict[str, Translate] = {}


def translates(*names: str) -> Callable[[Translate], Translate]:
    def under(function: Translate) -> Translate:
        TRANSLATIONS.update(dict.fromkeys(names, function))
        return function

    return under


def translate(block: Block, instruction: Instruction) -> Operation:
    found = TRANSLATIONS.get(instruction.parts[0])
    if found is None:
        raise Fault(f"an instruction that this machine does not know: {instruction.text}")
    return found(block, instruction)


def in_window(addresses: Array) -> str:
    """The space that generic addresses show."""
    top = int(addresses.max())
    return "param" if top >= PARAM_WINDOW else "shared" if top >= SHARED_WINDOW else "global"


def vector(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def arguments(kernel: Kernel, values: Sequence[Any]) -> bytes:
    """The parameter buffer of a launch: integers, fp32 numbers, and the bytes of structs."""
    if len(values) != len(kernel.params):
        raise ValueError(f"{kernel.name} takes {len(kernel.params)} parameters, got {len(values)}")
    held = bytearray(kernel.param_bytes)
    for param, value in zip(kernel.params, values):
        if isinstance(value, float):
            value = np.float32(value).tobytes()
        raw = value if isinstance(value, bytes) else value.to_bytes(param.size, "little", signed=value < 0)
        held[param.offset : param.offset + len(raw)] = raw
    return bytes(held)
