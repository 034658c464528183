"""Arithmetic, comparisons, conversions: one thread's own business."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from .machine import Array, Block, Operation, translates, vector
from .memory import SHARED_WINDOW, Fault
from .parse import Instruction, size_of
from .values import BITS, flushed, from_half, numpy_type, to_half


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Block, Instruction], Operation]:
    def translate(block: Block, given: Instruction) -> Operation:
        kind = given.parts[-1]
        if kind in ("f16", "bf16", "f16x2", "bf16x2"):
            raise Fault("arithmetic in 16 bits is not known here")
        to, a, b = block.target(given.operands[0]), *(block.source(o, kind) for o in given.operands[1:3])
        finish = flushed if "ftz" in given.parts else lambda value: value
        return lambda block, lanes: to(lanes, finish(function(a(lanes), b(lanes)).astype(numpy_type(kind))))

    return translate


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    if (b == 0).any():
        raise Fault("an integer divided by zero")
    if a.dtype.kind == "u":
        return a // b
    quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
    return np.where((a < 0) != (b < 0), -quotient, quotient)


def _remainder(a: Array, b: Array) -> Array:
    return a - _divide(a, b).astype(a.dtype) * b


translates("add")(_binary(operator.add))
translates("sub")(_binary(operator.sub))
translates("div")(_binary(_divide))
translates("rem")(_binary(_remainder))


@translates("min", "max")
def _extreme(block: Block, given: Instruction) -> Operation:
    """Of a number and a NaN, the number."""
    largest = given.parts[0] == "max"
    if given.parts[-1].startswith("f") and "NaN" not in given.parts:
        return _binary(np.fmax if largest else np.fmin)(block, given)
    return _binary(np.maximum if largest else np.minimum)(block, given)


@translates("and", "or", "xor")
def _bitwise(block: Block, given: Instruction) -> Operation:
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[given.parts[0]]
    kind = given.parts[-1]
    kind = kind if kind == "pred" else f"u{8 * size_of(kind)}"
    to, a, b = block.target(given.operands[0]), *(block.source(o, kind) for o in given.operands[1:3])
    return lambda block, lanes: to(lanes, function(a(lanes), b(lanes)))


@translates("not")
def _not(block: Block, given: Instruction) -> Operation:
    kind = "pred" if given.parts[-1] == "pred" else f"u{8 * size_of(given.parts[-1])}"
    to, a = block.target(given.operands[0]), block.source(given.operands[1], kind)
    return lambda block, lanes: to(lanes, ~a(lanes))


@translates("shl", "shr")
def _shift(block: Block, given: Instruction) -> Operation:
    left, kind = given.parts[0] == "shl", given.parts[-1].replace("b", "u")
    width = 8 * size_of(kind)
    to, a, by = (
        block.target(given.operands[0]),
        block.source(given.operands[1], kind),
        block.source(given.operands[2], "u32"),
    )

    def shift(block: Block, lanes: Array) -> None:
        value, count = a(lanes), by(lanes)
        if value.dtype.kind == "u":  # the count is not taken modulo the width, as numpy would
            moved = (value << count.astype(value.dtype)) if left else (value >> count.astype(value.dtype))
            to(lanes, np.where(count >= width, 0, moved).astype(value.dtype))
        else:
            to(lanes, value >> np.minimum(count, width - 1).astype(value.dtype))

    return shift


@translates("bfe")
def _extract(block: Block, given: Instruction) -> Operation:
    kind = given.parts[-1]
    wide = np.int64 if kind[0] == "s" else np.uint64
    to, a = block.target(given.operands[0]), block.source(given.operands[1], f"u{kind[1:]}")
    start, length = (block.source(o, "u32") for o in given.operands[2:4])

    def extract(block: Block, lanes: Array) -> None:
        bits = length(lanes).astype(np.uint64)
        value = (a(lanes).astype(np.uint64) >> start(lanes).astype(np.uint64)) & ((np.uint64(1) << bits) - np.uint64(1))
        if wide is np.int64:
            sign = np.uint64(1) << (bits - np.uint64(1))
            value = (value ^ sign) - sign
        to(lanes, value.astype(wide).astype(numpy_type(kind)))

    return extract


@translates("prmt")
def _permute(block: Block, given: Instruction) -> Operation:
    to, (a, b, by) = block.target(given.operands[0]), (block.source(o, "u32") for o in given.operands[1:4])

    def permute(block: Block, lanes: Array) -> None:
        pieces = np.stack([a(lanes), b(lanes)], 1).view(np.uint8)
        picks = by(lanes)[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)
        chosen = np.take_along_axis(pieces, (picks & np.uint32(7)).astype(np.int64), 1)
        sign = np.where(chosen & 0x80, 0xFF, 0).astype(np.uint8)
        to(lanes, np.where(picks & np.uint32(8), sign, chosen).astype(np.uint8).view(np.uint32)[:, 0])

    return permute


@translates("mul", "mad", "fma")
def _multiply(block: Block, given: Instruction) -> Operation:
    parts, kind = given.parts, given.parts[-1]
    to, a, b = block.target(given.operands[0]), *(block.source(o, kind) for o in given.operands[1:3])
    result = f"{kind[0]}{16 * size_of(kind)}" if "wide" in parts else kind
    c = block.source(given.operands[3], result) if len(given.operands) > 3 else None
    if "f" in kind:
        if kind != "f32":
            raise Fault("products in 16 or 64 bits are not known here")
        finish = flushed if "ftz" in parts else lambda value: value

        def floats(block: Block, lanes: Array) -> None:  # fp64 holds the product whole: one rounding, as fma has
            product = a(lanes).astype(np.float64) * b(lanes)
            to(lanes, finish((product if c is None else product + c(lanes)).astype(np.float32)))

        return floats

    def integers(block: Block, lanes: Array) -> None:
        if "hi" in parts:
            wide = np.int64 if kind[0] == "s" else np.uint64
            if size_of(kind) != 4:
                raise Fault("the high half of 64-bit products is not known here")
            product = ((a(lanes).astype(wide) * b(lanes).astype(wide)) >> wide(32)).astype(numpy_type(kind))
        else:
            dtype = numpy_type(result)
            product = a(lanes).astype(dtype) * b(lanes).astype(dtype)
        to(lanes, product if c is None else product + c(lanes))

    return integers


@translates("neg", "abs", "ex2", "rsqrt", "rcp", "sqrt", "lg2", "tanh")
def _unary(block: Block, given: Instruction) -> Operation:
    functions: dict[str, Callable[[Array], Array]] = {
        "neg": operator.neg, "abs": np.abs, "ex2": np.exp2, "rsqrt": lambda v: 1 / np.sqrt(v), "rcp": lambda v: 1 / v,
        "sqrt": np.sqrt, "lg2": np.log2, "tanh": np.tanh,
    }  # fmt: skip
    function, kind = functions[given.parts[0]], given.parts[-1]
    if kind not in ("f32", "s32", "s64"):
        raise Fault(f"{given.parts[0]} of {kind} is not known here")
    to, a = block.target(given.operands[0]), block.source(given.operands[1], kind)
    finish = flushed if "ftz" in given.parts else lambda value: value
    return lambda block, lanes: to(lanes, finish(function(a(lanes))))


@translates("setp")
def _compare(block: Block, given: Instruction) -> Operation:
    _, how, *rest = given.parts
    kind = rest[-1]
    combine = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}.get(rest[0])
    operands = list(given.operands)
    first, _, second = operands[0].partition("|")
    a, b = (block.source(o, kind.replace("b", "u")) for o in operands[1:3])
    if combine is not None:
        inverted = operands[3].startswith("!")
        other = block.source(operands[3].lstrip("!"), "pred")
    to, to_other = block.target(first), block.target(second or "_")
    ordered = {
        "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
        "ge": operator.ge, "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
    }  # fmt: skip

    def holds(x: Array, y: Array) -> Array:
        if x.dtype.kind != "f":
            return ordered[how](x, y)
        unordered = np.isnan(x) | np.isnan(y)
        if how in ("nan", "num"):
            return unordered if how == "nan" else ~unordered
        if how in ("equ", "neu", "ltu", "leu", "gtu", "geu"):  # true of NaN as well
            return ordered[how[:2]](x, y) | unordered
        return ordered[how](x, y) & ~unordered

    def compare(block: Block, lanes: Array) -> None:
        found = holds(a(lanes), b(lanes))
        negated = ~found
        if combine is not None:
            along = other(lanes) ^ inverted
            found, negated = combine(found, along), combine(negated, along)
        to(lanes, found)
        to_other(lanes, negated)

    return compare


@translates("selp")
def _select(block: Block, given: Instruction) -> Operation:
    kind = f"u{8 * size_of(given.parts[-1])}"
    to, a, b = block.target(given.operands[0]), *(block.source(o, kind) for o in given.operands[1:3])
    which = block.source(given.operands[3], "pred")
    return lambda block, lanes: to(lanes, np.where(which(lanes), a(lanes), b(lanes)))


@translates("cvt")
def _convert(block: Block, given: Instruction) -> Operation:
    *how, to_kind, from_kind = given.parts[1:]
    to = block.target(given.operands[0])
    if to_kind in ("bf16x2", "f16x2"):  # the first source goes to the upper half
        high, low = (block.source(o, "f32") for o in given.operands[1:3])
        return lambda block, lanes: to(
            lanes,
            (to_half(high(lanes), to_kind).astype(np.uint32) << np.uint32(16)) | to_half(low(lanes), to_kind),
        )
    a = block.source(given.operands[1], "u16" if from_kind in ("f16", "bf16") else from_kind)
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    whole = next((rounding[h] for h in how if h in rounding), None)
    if "sat" in how:
        raise Fault("saturating conversions are not known here")

    def convert(block: Block, lanes: Array) -> None:
        value = a(lanes)
        if from_kind in ("f16", "bf16"):
            value = from_half(value, from_kind)
        if to_kind in ("f16", "bf16"):
            to(lanes, to_half(value.astype(np.float32), to_kind))
            return
        if value.dtype.kind == "f" and whole is not None:
            value = whole(value)
        to(lanes, value.astype(numpy_type(to_kind)))

    return convert


@translates("mov")
def _move(block: Block, given: Instruction) -> Operation:
    kind, (left, right) = given.parts[-1], given.operands
    if left.startswith("{"):
        return _unpack(block, vector(left), right, size_of(kind))
    if right.startswith("{"):
        return _pack(block, left, vector(right), size_of(kind))
    to, a = block.target(left), block.source(right, kind if kind == "pred" else f"u{8 * size_of(kind)}")
    if kind in ("f32", "f64"):
        a = block.source(right, kind)
    return lambda block, lanes: to(lanes, a(lanes))


def _unpack(block: Block, names: list[str], whole: str, size: int) -> Operation:
    a, targets = block.source(whole, f"u{8 * size}"), [block.target(name) for name in names]

    def unpack(block: Block, lanes: Array) -> None:
        pieces = np.ascontiguousarray(a(lanes)).view(BITS[size // len(names)]).reshape(-1, len(names))
        for i, to in enumerate(targets):
            to(lanes, pieces[:, i])

    return unpack


def _pack(block: Block, whole: str, names: list[str], size: int) -> Operation:
    to, sources = block.target(whole), [block.source(name, f"u{8 * size // len(names)}") for name in names]
    return lambda block, lanes: to(lanes, np.stack([a(lanes) for a in sources], 1).view(BITS[size])[:, 0])


@translates("cvta")
def _generic(block: Block, given: Instruction) -> Operation:
    """Generic addresses show shared memory in a window; parameters' and device memory's are their own."""
    to, a = block.target(given.operands[0]), block.source(given.operands[1], "u64")
    if not {"shared", "shared:cta"} & set(given.parts):
        return lambda block, lanes: to(lanes, a(lanes))
    away = "to" in given.parts
    window = np.uint64(SHARED_WINDOW)
    return lambda block, lanes: to(lanes, a(lanes) - window if away else a(lanes) + window)
