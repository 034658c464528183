"""The width classes of ragged_attention on NVIDIA GPUs, and which head is of which: data, not code.

A head is computed at the smallest class, (16, 16) … (128, 128), that covers its Dqk and Dv. A *menu* is the tuple of
classes that one compiled kernel knows. A layer whose heads are alike gets a menu of that one class; mixed layers share
the few menus below, so a new model of as many tokens compiles nothing new.
"""

from __future__ import annotations

from .._expect import expect
from ..heads import HeadTable
from ..units import round_up

Class = tuple[int, int]

# Heaviest first. Beside its exponentials (on an H100, one costs what 128 multiply-adds do) the products of a head are
# cheap, so a mixed layer does with few classes: every class more is compiled in every layer that is mixed.
MIXED_MENUS: tuple[tuple[Class, ...], ...] = (
    ((32, 32), (32, 16), (16, 32), (16, 16)),
    ((64, 64), (64, 32), (32, 64), (16, 32), (16, 16)),
)
WIDE_MENU: tuple[Class, ...] = ((128, 128), (64, 64), (32, 32))


def exact_class(qk_dim: int, v_dim: int) -> Class:
    """The widths that one head is computed at when no other head has a say."""

    def up(dim: int) -> int:
        width = round_up(dim, 16)
        return 128 if width == 112 else width  # 64 + 32 + 16 would be three products

    return up(qk_dim), up(v_dim)


def chunks(width: int) -> tuple[int, int]:
    """dot and arange want powers of two: a width of 48 is computed as 32 + 16."""
    largest = 1 << (width.bit_length() - 1)
    return largest, width - largest


def menu_for(heads: HeadTable) -> tuple[Class, ...]:
    """The classes that the kernel for a layer is compiled with."""
    exact = {exact_class(qk, v) for qk, v in zip(heads.qk_dims, heads.v_dims)}
    if len(exact) == 1:
        return (exact.pop(),)
    widest = max(max(widths) for widths in exact)
    return next((menu for menu in MIXED_MENUS if menu[0][0] >= widest), WIDE_MENU)


def head_classes(heads: HeadTable, menu: tuple[Class, ...]) -> list[int]:
    """For each head, the lightest class of the menu that covers it."""
    return [
        max(c for c, (qk, v) in enumerate(menu) if qk >= qk_dim and v >= v_dim)
        for qk_dim, v_dim in zip(heads.qk_dims, heads.v_dims)
    ]


def head_rows(heads: HeadTable, menu: tuple[Class, ...]) -> list[list[int]]:
    """A row a head, heaviest first: class, then q, k, v, o, ⌈Dqk⌉, ⌈Dv⌉ in units of 8, then Dv."""
    for name in ("q", "k", "v", "o"):
        offsets = getattr(heads, name)
        expect(all(o % 8 == 0 for o in offsets), f"{name} slices that start on multiples of 8", got=offsets)
    classes = head_classes(heads, menu)
    return [
        [classes[h], heads.q[h] // 8, heads.k[h] // 8, heads.v[h] // 8, heads.o[h] // 8,
         -(-heads.qk_dims[h] // 8), -(-heads.v_dims[h] // 8), heads.v_dims[h]]
        for h in sorted(range(len(heads)), key=classes.__getitem__)
    ]  # fmt: skip
