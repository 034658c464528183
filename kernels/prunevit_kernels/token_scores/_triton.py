"""token_scores on NVIDIA GPUs, in two launches: how large each query's softmax sum is, then what each key receives.

Nothing of size N × N is kept, and no atomics: the same input gives the same scores. All heads of a layer are computed
at the width of the widest; this runs in the few layers that choose tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, scores_tile
from .._expect import expect
from .._launch import Call, TritonOp, expect_rows, scratch_for
from .._overlap import await_launches
from ..ragged_attention._classes import chunks, exact_class
from ..ragged_attention._triton import load_rows, multiply_scores
from ..target import Target
from . import TokenScores


@triton.jit(do_not_specialize=["H", "N", "NQ", "image8", "row8"])
def softmax_sums_kernel(
    qkv, sums, table, H, N, NQ, image8, row8,
    Q0: tl.constexpr, Q1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """sums [B, H, NQ] = log2 Σ_keys 2^score."""
    await_launches(PDL)
    # locate
    query_blocks = tl.cdiv(NQ, BLOCK_M)
    map_index = tl.program_id(0) // query_blocks
    entry = table + map_index % H * 4
    qkv += (map_index // H).to(tl.int64) * image8 * 8
    k = qkv + tl.load(entry + 1) * 8
    qk8 = tl.load(entry + 2)
    queries = tl.program_id(0) % query_blocks * BLOCK_M + tl.arange(0, BLOCK_M)

    # load
    q0, q1 = load_rows(qkv + tl.load(entry) * 8, queries, NQ, row8, qk8, Q0, Q1, True)

    # compute in fp32
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, N, BLOCK_N, num_stages=STAGES):
        keys = first + tl.arange(0, BLOCK_N)
        k0, k1 = load_rows(k, keys, N, row8, qk8, Q0, Q1, True)
        scores = tl.where((keys < N)[None, :], multiply_scores(q0, q1, k0, k1, Q1), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), 1)
        top = new_top

    # store
    tl.store(sums + map_index.to(tl.int64) * NQ + queries, top + tl.log2(total), mask=queries < NQ)


@triton.jit(do_not_specialize=["H", "N", "NQ", "image8", "row8", "scores_image"])
def token_scores_kernel(
    qkv, sums, table, scores, H, N, NQ, image8, row8, scores_image,
    ADD: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """scores [B, N] = Σ_heads max_queries 2^(score − sum)."""
    await_launches(PDL)
    # locate
    key_blocks = tl.cdiv(N, BLOCK_N)
    image = (tl.program_id(0) // key_blocks).to(tl.int64)
    keys = tl.program_id(0) % key_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    qkv += image * image8 * 8
    sums += image * H * NQ
    scores += image * scores_image

    received = tl.zeros([BLOCK_N], tl.float32)
    for head in range(H):
        # load
        entry = table + head * 4
        q = qkv + tl.load(entry) * 8
        qk8 = tl.load(entry + 2)
        k0, k1 = load_rows(qkv + tl.load(entry + 1) * 8, keys, N, row8, qk8, Q0, Q1, True)

        # compute in fp32
        most = tl.zeros([BLOCK_N], tl.float32)
        for first in tl.range(0, NQ, BLOCK_M, num_stages=STAGES):
            queries = first + tl.arange(0, BLOCK_M)
            q0, q1 = load_rows(q, queries, NQ, row8, qk8, Q0, Q1, True)
            # queries that do not exist pay nothing: 2^(score − ∞)
            total = tl.load(sums + head * NQ + queries, mask=queries < NQ, other=float("inf"))
            paid = tl.exp2(multiply_scores(q0, q1, k0, k1, Q1) - total[:, None])
            most = tl.maximum(most, tl.max(paid, 0))
        received += most

    # store
    present = keys < N
    if ADD:
        received += tl.load(scores + keys, mask=present, other=0.0)
    tl.store(scores + keys, received, mask=present)


class Packed(TritonOp[TokenScores]):
    def __init__(self, op: TokenScores, target: Target) -> None:
        super().__init__(op, target)
        heads = op.heads
        expect(all(offset % 8 == 0 for offset in (*heads.q, *heads.k)), "slices on multiples of 8", got=heads)
        rows = [[q // 8, k // 8, -(-dim // 8), 0] for q, k, dim in zip(heads.q, heads.k, heads.qk_dims)]
        self.table = torch.tensor(rows, dtype=torch.int32, device=target.device)
        self.chunks = chunks(exact_class(max(heads.qk_dims), 1)[0])

    def calls(self, qkv: Tensor, scores: Tensor) -> list[Call]:
        expect_rows("qkv", qkv)
        b, n, _ = qkv.shape
        h = len(self.table)
        queries = self.op.queries(n)
        sums = scratch_for(scores, (b * h * queries,), torch.float32)
        problem = Problem("token_scores", (b, queries, n), self.chunks)
        tile = scores_tile(self.target, problem)
        pitches = (qkv.stride(0) // 8, qkv.stride(1) // 8)
        constants = {
            "Q0": self.chunks[0], "Q1": self.chunks[1],
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages,
            "PDL": self.target.overlaps,
        }  # fmt: skip
        spread = Call(
            token_scores_kernel, b * -(-n // tile.block_n),
            (qkv, sums, self.table, scores, h, n, queries, *pitches, scores.stride(0)),
            {"ADD": self.op.accumulate, **constants}, tile, problem,
        )  # fmt: skip
        grid = b * h * -(-queries // tile.block_m)
        args = (qkv, sums, self.table, h, n, queries, *pitches)
        return [Call(softmax_sums_kernel, grid, args, constants, tile, problem), spread]
