"""ragged_attention on NVIDIA GPUs: one launch for all heads of a layer.

Heads fall into width classes, (16, 16) … (128, 128): a head is computed at the smallest class that covers its Dqk and
Dv. The kernel holds one specialised body per class and switches between them, so a launch may mix widths; which head is
of which class is data. A *menu* is the tuple of classes that one compiled kernel knows. A layer whose heads are alike
gets a menu of that one class; mixed layers share the few menus below, so a new model compiles nothing new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, attention_tile
from .._expect import expect
from .._launch import Call, TritonOp, expect_rows
from .._overlap import await_launches
from ..heads import HeadTable
from ..target import Target
from ..units import round_up
from . import RaggedAttention

Class = tuple[int, int]

# Heaviest first. Beside its exponentials (on an H100, one costs what 128 multiply-adds do) the products of a head are
# cheap, so a mixed layer does with few classes: every class more is compiled in every layer that is mixed.
MIXED_MENUS: tuple[tuple[Class, ...], ...] = (
    ((32, 32), (32, 16), (16, 32), (16, 16)),
    ((64, 64), (64, 32), (32, 64), (16, 32), (16, 16)),
)
WIDE_MENU: tuple[Class, ...] = ((128, 128), (64, 64), (32, 32))


@triton.jit
def load_slice(rows, first: tl.constexpr, WIDTH: tl.constexpr, width8, row_mask, MASKED: tl.constexpr):
    """Columns first … first + WIDTH of some rows, zero past the slice. ``rows`` points at each row's slice."""
    cols = first + tl.arange(0, WIDTH)
    # the width in units of 8: a mask that may change at any column would forbid 16-byte copies
    inside = (cols < width8 * 8)[None, :]
    if MASKED:
        inside = inside & row_mask[:, None]
    return tl.load(rows[:, None] + cols[None, :], mask=inside, other=0.0)


@triton.jit
def _attend_keys(
    q0, q1, k_base, v_base, row8, first, N, qk8, v8, acc0, acc1, top, total,
    Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys first … first + KEYS."""
    keys = first + tl.arange(0, KEYS)
    present = keys < N
    k_rows = k_base + keys * (row8 * 8)
    v_rows = v_base + keys * (row8 * 8)
    scores = tl.dot(q0, tl.trans(load_slice(k_rows, 0, Q0, qk8, present, MASKED)))
    if Q1 > 0:
        scores = tl.dot(q1, tl.trans(load_slice(k_rows, Q0, Q1, qk8, present, MASKED)), scores)
    if MASKED:
        scores = tl.where(present[None, :], scores, float("-inf"))

    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(p, 1)
    p = p.to(q0.dtype)
    acc0 = tl.dot(p, load_slice(v_rows, 0, V0, v8, present, MASKED), acc0 * rescale[:, None])
    if V1 > 0:
        acc1 = tl.dot(p, load_slice(v_rows, V0, V1, v8, present, MASKED), acc1 * rescale[:, None])
    return acc0, acc1, new_top, total


@triton.jit
def _store_slice(rows, first: tl.constexpr, WIDTH: tl.constexpr, width, width8, row_mask, value):
    cols = first + tl.arange(0, WIDTH)
    value = tl.where((cols < width)[None, :], value, 0.0)  # the gap after a slice is written as zeros
    inside = row_mask[:, None] & (cols < width8 * 8)[None, :]
    tl.store(rows[:, None] + cols[None, :], value.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q, k, v, o, qk8, v8, v_dim, query_block, N, NQ, row8, out_row8,
    Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one image, at the widths of one class."""
    # locate
    queries = query_block * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = queries < NQ

    # load
    q_rows = q + queries * (row8 * 8)
    q0 = load_slice(q_rows, 0, Q0, qk8, asked, True)
    q1 = q0
    if Q1 > 0:
        q1 = load_slice(q_rows, Q0, Q1, qk8, asked, True)

    # compute in fp32
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = acc0
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    whole = N // BLOCK_N * BLOCK_N
    for first in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, BLOCK_N, False
        )
        # Triton waits for the sums here, since they are touched. Else it leaves the product in flight when the loop
        # goes round, and touches them there: ptxas answers by serialising every product of the kernel (C7515).
        acc0 += 0.0
        if V1 > 0:
            acc1 += 0.0
    # the keys that are left, in binary: 197 = 3 · 64 + 5 costs a tile of 16, not one of 64
    first = whole
    if TAIL & 128:
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, 128, True
        )
    if TAIL & 64:
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, 64, True
        )
        first += 64
    if TAIL & 32:
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, 32, True
        )
        first += 32
    if TAIL & 16:
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, 16, True
        )

    # store
    o_rows = o + queries * (out_row8 * 8)
    inverse = 1.0 / total
    _store_slice(o_rows, 0, V0, v_dim, v8, asked, acc0 * inverse[:, None])
    if V1 > 0:
        _store_slice(o_rows, V0, V1, v_dim, v8, asked, acc1 * inverse[:, None])


# Offsets, widths and pitches come in units of 8 and are multiplied here: as plain integers the compiler could not
# know that rows start on 16 bytes. Nothing is specialised on their values, so no new shape compiles anew.
@triton.jit(do_not_specialize=["B", "N", "NQ", "image8", "row8", "out_image8", "out_row8"])
def ragged_attention_kernel(
    qkv, out, table, B, N, NQ, image8, row8, out_image8, out_row8,
    MENU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    await_launches(PDL)
    query_blocks = tl.cdiv(NQ, BLOCK_M)
    program = tl.program_id(0)
    head = program // (query_blocks * B)
    image = program // query_blocks % B
    query_block = program % query_blocks
    qkv += image.to(tl.int64) * image8 * 8
    out += image.to(tl.int64) * out_image8 * 8
    entry = table + head * 8
    # all of the entry at once: what a class needs must not wait until the class is known
    head_class = tl.load(entry)
    q = qkv + tl.load(entry + 1) * 8
    k = qkv + tl.load(entry + 2) * 8
    v = qkv + tl.load(entry + 3) * 8
    o = out + tl.load(entry + 4) * 8
    qk8 = tl.load(entry + 5)
    v8 = tl.load(entry + 6)
    v_dim = tl.load(entry + 7)
    for c in tl.static_range(len(MENU)):
        if len(MENU) == 1 or head_class == c:
            _attend(
                q, k, v, o, qk8, v8, v_dim, query_block, N, NQ, row8, out_row8,
                MENU[c][0], MENU[c][1], MENU[c][2], MENU[c][3], BLOCK_M, BLOCK_N, TAIL, STAGES,
            )  # fmt: skip


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


class Packed(TritonOp[RaggedAttention]):
    def __init__(self, op: RaggedAttention, target: Target) -> None:
        super().__init__(op, target)
        self.menu = menu_for(op.heads)
        self.table = torch.tensor(head_rows(op.heads, self.menu), dtype=torch.int32, device=target.device)

    def calls(self, qkv: Tensor, out: Tensor) -> list[Call]:
        expect_rows("qkv", qkv)
        expect_rows("out", out)
        b, n, _ = qkv.shape
        queries = out.shape[1]
        problem = Problem("ragged_attention", (b * len(self.table), queries, n), (*self.menu[0], len(self.menu)))
        tile = attention_tile(self.target, problem)
        expect(tile.block_n <= 128, "a tile of at most 128 keys", got=tile)
        tail = round_up(n % tile.block_n, 16)
        grid = -(-queries // tile.block_m) * b * len(self.table)
        pitches = [stride // 8 for stride in (qkv.stride(0), qkv.stride(1), out.stride(0), out.stride(1))]
        constants = {
            "MENU": tuple((*chunks(qk), *chunks(v)) for qk, v in self.menu),
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "TAIL": tail, "STAGES": tile.stages,
            "PDL": self.target.overlaps,
        }  # fmt: skip
        args = (qkv, out, self.table, b, n, queries, *pitches)
        return [Call(ragged_attention_kernel, grid, args, constants, tile, problem)]
