"""select_tokens on NVIDIA GPUs: each token counts how many come before it, no sort.

N² comparisons of one image are a few microseconds of one program even at 4097 tokens, and the count breaks ties by
position exactly as the reference does. A NaN score ranks as +∞.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, Tile
from .._launch import Call, TritonOp, expect_rows, scratch_for
from .._linear import store_columns
from .._overlap import await_launches
from . import SelectTokens

TILE = Tile(block_m=32, block_n=128, warps=4, stages=2)


@triton.jit
def _load_scores(scores, tokens, PREFIX, N):
    """Scores of patch tokens; others rank below any."""
    values = tl.load(scores + tokens, mask=(tokens >= PREFIX) & (tokens < N), other=float("-inf"))
    return tl.where(values != values, float("inf"), values)


@triton.jit(do_not_specialize=["N", "PREFIX", "KEEP", "scores_image"])
def mark_kept_kernel(
    scores, kept, N, PREFIX, KEEP, scores_image,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """kept [B, N] = 1 where a token stays."""
    await_launches(PDL)
    blocks = tl.cdiv(N, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    tokens = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    scores += image * scores_image
    mine = _load_scores(scores, tokens, PREFIX, N)[:, None]
    ahead = tl.zeros([BLOCK_M], tl.int32)
    for first in range(0, N, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        theirs = _load_scores(scores, others, PREFIX, N)[None, :]
        is_patch = (others >= PREFIX) & (others < N)
        earlier = others[None, :] < tokens[:, None]
        beats = (theirs > mine) | ((theirs == mine) & earlier)
        ahead += tl.sum((beats & is_patch[None, :]).to(tl.int32), 1)
    stays = (tokens < PREFIX) | (ahead < KEEP)
    tl.store(kept + image * N + tokens, stays.to(tl.int32), mask=tokens < N)


@triton.jit(do_not_specialize=["N", "E", "x_image8", "x_row8", "y_image8", "y_row8", "scores_image", "out_image"])
def gather_kept_kernel(
    x, scores, kept, kept_x, kept_scores, N, E, x_image8, x_row8, y_image8, y_row8, scores_image, out_image,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Copy the tokens that stay, in their order."""
    await_launches(PDL)
    # locate: a token goes behind all that stay before it
    blocks = tl.cdiv(N, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = tl.program_id(0) % blocks * BLOCK_M
    tokens = first + tl.arange(0, BLOCK_M)
    kept += image * N
    before = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, first, BLOCK_M):
        before += tl.load(kept + start + tl.arange(0, BLOCK_M))
    stays = tl.load(kept + tokens, mask=tokens < N, other=0)
    places = tl.sum(before, 0) + tl.cumsum(stays, 0) - stays
    stays = stays > 0

    # copy
    values = tl.load(scores + image * scores_image + tokens, mask=stays, other=0.0)
    tl.store(kept_scores + image * out_image + places, values, mask=stays)
    x_rows = x + image * x_image8 * 8 + tokens * (x_row8 * 8)
    y_rows = kept_x + image * y_image8 * 8 + places * (y_row8 * 8)
    for start in range(0, E, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        groups = (cols < tl.cdiv(E, 8) * 8)[None, :]
        rows = tl.load(x_rows[:, None] + cols[None, :], mask=stays[:, None] & groups, other=0.0)
        store_columns(y_rows, start, E, stays, rows, BLOCK_N)


@triton.jit(
    do_not_specialize=["N", "E", "LAST", "x_image8", "x_row8", "y_image8", "y_row8", "scores_image", "out_image"]
)
def fuse_dropped_kernel(
    x, scores, kept, kept_x, kept_scores, N, E, LAST, x_image8, x_row8, y_image8, y_row8, scores_image, out_image,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The last token: the mean of the dropped ones, weighted by their scores."""
    await_launches(PDL)
    blocks = tl.cdiv(E, BLOCK_N)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x += image * x_image8 * 8
    mean = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, N, BLOCK_M):
        tokens = first + tl.arange(0, BLOCK_M)
        dropped = tl.load(kept + image * N + tokens, mask=tokens < N, other=1) == 0
        weight = tl.load(scores + image * scores_image + tokens, mask=dropped, other=0.0)
        groups = (cols < tl.cdiv(E, 8) * 8)[None, :]
        rows = tl.load(x + tokens[:, None] * (x_row8 * 8) + cols[None, :], mask=dropped[:, None] & groups, other=0.0)
        mean += tl.sum(weight[:, None] * rows.to(tl.float32), 0)
        total += weight
    sum_of_scores = tl.sum(total, 0)
    mean = mean / tl.maximum(sum_of_scores, 1e-20)
    row = kept_x + image * y_image8 * 8 + LAST * (y_row8 * 8)
    tl.store(row + cols, mean.to(x.dtype.element_ty), mask=cols < E)
    tl.store(kept_scores + image * out_image + LAST, sum_of_scores, mask=block == 0)


class Packed(TritonOp[SelectTokens]):
    def calls(self, x: Tensor, scores: Tensor, kept_x: Tensor, kept_scores: Tensor) -> list[Call]:
        expect_rows("x", x)
        expect_rows("kept_x", kept_x)
        op, (b, n, e) = self.op, x.shape
        kept = scratch_for(kept_x, (b * n,), torch.int32)
        pitches = [stride // 8 for stride in (*x.stride()[:2], *kept_x.stride()[:2])]
        images = (scores.stride(0), kept_scores.stride(0))
        problem = Problem("select", (b, n, e))
        blocks = {"BLOCK_M": TILE.block_m, "BLOCK_N": TILE.block_n, "PDL": self.target.overlaps}
        programs = b * -(-n // TILE.block_m)
        buffers = (x, scores, kept, kept_x, kept_scores)
        calls = [
            Call(mark_kept_kernel, programs, (scores, kept, n, op.prefix, op.keep, images[0]), blocks, TILE, problem),
            Call(gather_kept_kernel, programs, (*buffers, n, e, *pitches, *images), blocks, TILE, problem),
        ]
        if op.fuse:
            args = (*buffers, n, e, op.out_tokens - 1, *pitches, *images)
            calls.append(Call(fuse_dropped_kernel, b * -(-e // TILE.block_n), args, blocks, TILE, problem))
        return calls
