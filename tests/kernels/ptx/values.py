"""Registers hold bits; here they become numbers of a PTX type, and back."""

from __future__ import annotations

from functools import cache

import numpy as np

Array = np.ndarray

BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_NUMPY = {
    "u8": "u1", "s8": "i1", "b8": "u1", "u16": "u2", "s16": "i2", "b16": "u2", "u32": "u4", "s32": "i4", "b32": "u4",
    "u64": "u8", "s64": "i8", "b64": "u8", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2", "f16x2": "u4",
    "bf16x2": "u4",
}  # fmt: skip


def numpy_type(kind: str) -> np.dtype:
    """How numpy holds a PTX type; bf16 as its bits."""
    return np.dtype(_NUMPY[kind])


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: Array) -> Array:
    """The bits of the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FFF, nearest).astype(np.uint16)


def to_half(values: Array, kind: str) -> Array:
    """fp32 to the bits of f16 or bf16, rounded to the nearest."""
    return to_bf16(values) if kind.startswith("bf16") else values.astype(np.float16).view(np.uint16)


def from_half(bits: Array, kind: str) -> Array:
    return from_bf16(bits) if kind.startswith("bf16") else bits.view(np.float16).astype(np.float32)


def flushed(values: Array) -> Array:
    """``.ftz``: subnormal results are zero."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)


@cache
def immediate(text: str) -> int | float | None:
    """A literal's value, or None."""
    if text[:2] in ("0f", "0F"):
        return float(np.uint32(int(text[2:], 16)).view(np.float32))
    if text[:2] in ("0d", "0D"):
        return float(np.uint64(int(text[2:], 16)).view(np.float64))
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        return None
