"""ragged_attention on NVIDIA GPUs: one launch for all heads of a layer.

The kernel holds one specialised body per class of widths (:mod:`._classes`) and switches between them, so a launch may
mix widths; which head is of which class is data.

A tile that covers all keys is one pass: every score of a block of queries is in registers, there is one maximum, and
nothing is rescaled. Otherwise keys go through a loop in tiles, by the online softmax.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, attention_tile
from .._expect import expect
from .._launch import Call, TritonOp, expect_rows
from .._linear import touched
from .._overlap import await_launches
from ..target import Target
from ..units import round_up
from . import RaggedAttention
from ._classes import chunks, head_rows, menu_for

MOST_IMAGES = 65535  # of a launch: what CUDA allows along the second axis of a grid


@triton.jit
def _load_slice(rows, first: tl.constexpr, WIDTH: tl.constexpr, width8, row_mask, MASKED: tl.constexpr):
    """Columns first … first + WIDTH of some rows, zero past the slice. ``rows`` points at each row's slice."""
    cols = first + tl.arange(0, WIDTH)
    # the width in units of 8: a mask that may change at any column would forbid 16-byte copies
    inside = (cols < width8 * 8)[None, :]
    if MASKED:
        inside = inside & row_mask[:, None]
    return tl.load(rows[:, None] + cols[None, :], mask=inside, other=0.0)


@triton.jit
def load_rows(base, rows, limit, row8, width8, W0: tl.constexpr, W1: tl.constexpr, MASKED: tl.constexpr):
    """Slices of some rows of q, k or v in two chunks of columns; where MASKED, rows from ``limit`` on are zeros."""
    row = base + rows * (row8 * 8)
    first = _load_slice(row, 0, W0, width8, rows < limit, MASKED)
    second = first
    if W1 > 0:
        second = _load_slice(row, W0, W1, width8, rows < limit, MASKED)
    return first, second


@triton.jit
def multiply_scores(q0, q1, k0, k1, Q1: tl.constexpr):
    scores = tl.dot(q0, tl.trans(k0))
    if Q1 > 0:
        scores = tl.dot(q1, tl.trans(k1), scores)
    return scores


@triton.jit
def _scores(q0, q1, k, keys, N, row8, qk8, Q0: tl.constexpr, Q1: tl.constexpr, MASKED: tl.constexpr):
    k0, k1 = load_rows(k, keys, N, row8, qk8, Q0, Q1, MASKED)
    scores = multiply_scores(q0, q1, k0, k1, Q1)
    if MASKED:
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
    return scores


@triton.jit
def _attend_keys(
    q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total,
    Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: keys first … first + KEYS."""
    keys = first + tl.arange(0, KEYS)
    scores = _scores(q0, q1, k, keys, N, row8, qk8, Q0, Q1, MASKED)
    v0, v1 = load_rows(v, keys, N, row8, v8, V0, V1, MASKED)

    new_top = tl.maximum(top, tl.max(scores, 1))
    p = tl.exp2(scores - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    total = total * rescale + tl.sum(p, 1)
    p = p.to(q0.dtype)
    acc0 = tl.dot(p, v0, acc0 * rescale[:, None])
    if V1 > 0:
        acc1 = tl.dot(p, v1, acc1 * rescale[:, None])
    return acc0, acc1, new_top, total


@triton.jit
def _attend_in_steps(
    q0, q1, k, v, row8, N, qk8, v8, acc0, acc1, top, total,
    Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_N: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax: whole tiles of keys in a loop, what is left behind it."""
    whole = N // BLOCK_N * BLOCK_N
    for first in tl.range(0, whole, BLOCK_N, num_stages=STAGES):
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, BLOCK_N, False
        )
        # Triton waits for the sums here, since they are touched. Else it leaves the product in flight when the loop
        # goes round, and touches them there: ptxas answers by serialising every product of the kernel (C7515).
        acc0 = touched(acc0)
        if V1 > 0:
            acc1 = touched(acc1)
    first = whole
    for i in tl.static_range(len(REST)):
        acc0, acc1, top, total = _attend_keys(
            q0, q1, k, v, row8, first, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, REST[i], True
        )
        first += REST[i]
    return acc0, acc1, total


@triton.jit
def _with(tiles, tile):
    return tiles + (tile,)  # noqa: RUF005  Triton knows no unpacking


@triton.jit
def _attend_at_once(
    q0, q1, k, v, row8, N, qk8, v8, acc0, acc1, top, total,
    Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Softmax over all keys, in tiles of which only the last may reach past them."""
    # values before scores: nothing else would hide their latency
    keys, values, scores = (), (), ()
    first = 0
    for i in tl.static_range(len(PIECES)):
        keys = _with(keys, first + tl.arange(0, PIECES[i]))
        values = _with(values, load_rows(v, keys[i], N, row8, v8, V0, V1, i == len(PIECES) - 1))
        first += PIECES[i]
    for i in tl.static_range(len(PIECES)):
        scores = _with(scores, _scores(q0, q1, k, keys[i], N, row8, qk8, Q0, Q1, i == len(PIECES) - 1))
        top = tl.maximum(top, tl.max(scores[i], 1))
    for i in tl.static_range(len(PIECES)):
        p = tl.exp2(scores[i] - top[:, None])
        total += tl.sum(p, 1)
        p = p.to(q0.dtype)
        acc0 = tl.dot(p, values[i][0], acc0)
        if V1 > 0:
            acc1 = tl.dot(p, values[i][1], acc1)
    return acc0, acc1, total


@triton.jit
def _store_slice(rows, first: tl.constexpr, WIDTH: tl.constexpr, width, width8, row_mask, value):
    cols = first + tl.arange(0, WIDTH)
    value = tl.where((cols < width)[None, :], value, 0.0)  # the gap after a slice is written as zeros
    inside = row_mask[:, None] & (cols < width8 * 8)[None, :]
    tl.store(rows[:, None] + cols[None, :], value.to(rows.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    q, k, v, o, qk8, v8, v_dim, N, NQ, row8, out_row8,
    Q0: tl.constexpr, Q1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head of one image, at the widths of one class."""
    # locate
    queries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)

    # load
    q0, q1 = load_rows(q, queries, NQ, row8, qk8, Q0, Q1, True)

    # compute in fp32
    acc0 = tl.zeros([BLOCK_M, V0], tl.float32)
    acc1 = acc0
    if V1 > 0:
        acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if BLOCK_N > 0:
        acc0, acc1, total = _attend_in_steps(
            q0, q1, k, v, row8, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, BLOCK_N, REST, STAGES
        )
    else:
        acc0, acc1, total = _attend_at_once(
            q0, q1, k, v, row8, N, qk8, v8, acc0, acc1, top, total, Q0, Q1, V0, V1, REST
        )

    # store
    asked = queries < NQ
    o_rows = o + queries * (out_row8 * 8)
    inverse = 1.0 / total
    _store_slice(o_rows, 0, V0, v_dim, v8, asked, acc0 * inverse[:, None])
    if V1 > 0:
        _store_slice(o_rows, V0, V1, v_dim, v8, asked, acc1 * inverse[:, None])


# Offsets, widths and pitches come in units of 8 and are multiplied here: as plain integers the compiler could not
# know that rows start on 16 bytes. Nothing is specialised on their values: of a new shape only the
# number of tokens, by its tiles, compiles anew.
@triton.jit(do_not_specialize=["N", "NQ", "image8", "row8", "out_image8", "out_row8"])
def ragged_attention_kernel(
    qkv, out, table, N, NQ, image8, row8, out_image8, out_row8,
    MENU: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A grid of query blocks × images × heads. REST are the tiles of keys behind the loop; BLOCK_N 0 is no loop."""
    await_launches(PDL)
    image = tl.program_id(1).to(tl.int64)
    qkv += image * image8 * 8
    out += image * out_image8 * 8
    entry = table + tl.program_id(2) * 8
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
                q, k, v, o, qk8, v8, v_dim, N, NQ, row8, out_row8,
                MENU[c][0], MENU[c][1], MENU[c][2], MENU[c][3], BLOCK_M, BLOCK_N, REST, STAGES,
            )  # fmt: skip


def binary(keys: int) -> tuple[int, ...]:
    """Tiles of at most 128 keys that cover so many: 197 are 128 + 64 + 16, not four of 64."""
    covered = round_up(keys, 16)
    return (128,) * (covered // 128) + tuple(tile for tile in (64, 32, 16) if covered & tile)


class Packed(TritonOp[RaggedAttention]):
    def __init__(self, op: RaggedAttention, target: Target) -> None:
        super().__init__(op, target)
        self.menu = menu_for(op.heads)
        self.table = torch.tensor(head_rows(op.heads, self.menu), dtype=torch.int32, device=target.device)

    def calls(self, qkv: Tensor, out: Tensor) -> list[Call]:
        expect_rows("qkv", qkv)
        expect_rows("out", out)
        (b, n, _), queries = qkv.shape, out.shape[1]
        problem = Problem("ragged_attention", (b * len(self.table), queries, n), (*self.menu[0], len(self.menu)))
        tile = attention_tile(self.target, problem)
        at_once = n <= tile.block_n
        expect(at_once or tile.block_n <= 128, "a tile of all keys or of at most 128", got=tile, want=n)
        pitches = [stride // 8 for stride in (qkv.stride(0), qkv.stride(1), out.stride(0), out.stride(1))]
        constants = {
            "MENU": tuple((*chunks(qk), *chunks(v)) for qk, v in self.menu),
            "BLOCK_M": tile.block_m, "BLOCK_N": 0 if at_once else tile.block_n,
            "REST": binary(n if at_once else n % tile.block_n), "STAGES": tile.stages,
            "PDL": self.target.overlaps,
        }  # fmt: skip
        calls = []
        for images in range(0, b, MOST_IMAGES):
            few = slice(images, images + MOST_IMAGES)
            grid = (-(-queries // tile.block_m), len(qkv[few]), len(self.table))
            args = (qkv[few], out[few], self.table, n, queries, *pitches)
            calls.append(Call(ragged_attention_kernel, grid, args, constants, tile, problem))
        return calls
