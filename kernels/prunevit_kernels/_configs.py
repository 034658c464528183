"""Tile sizes of the Triton kernels: every default, and every candidate that the tuner tries, in one place.

A default is chosen by rule from the problem's sizes. The rules were set from what the compiler made (registers,
shared memory), not from timings; :mod:`prunevit_kernels.tune` measures the candidates and writes what it finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from .target import Target
from .units import dtype_name

KernelName = Literal[
    "ragged_attention", "norm_linear", "linear", "linear_residual", "patch_embed", "token_scores", "rows", "select",
    "fused_mlp",
]  # fmt: skip

# What can run a fused_mlp: the CUDA extension's kernels, as csrc/cuda/plan.h counts them, and the Triton pair.
CUDA_MLP_KERNELS = ("fused", "split", "two_gemms", "wgmma", "wgmma_gemms")
MLP_KERNELS = (*CUDA_MLP_KERNELS, "triton")

# A tile of attention that covers all keys keeps their scores in registers: one pass. More than this, and it loops.
ONE_PASS = 256


@dataclass(frozen=True)
class Tile:
    """What a program computes, and with how many warps and pipeline stages. ``block_k`` is unused in attention."""

    block_m: int
    block_n: int
    block_k: int = 64
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Problem:
    """What a tile is chosen for: a kernel, the sizes of its work (m, n, k), and how it is specialised.

    Attention: m is heads × images, n queries, k keys, and ``variant`` the heaviest class and how many there are.
    Linear kernels: m rows, n output columns, k input columns. fused_mlp: m rows, n hidden columns, k the residual's,
    and ``variant`` how many of those are read and written; what is chosen is a kernel, not a tile.
    """

    kernel: KernelName
    sizes: tuple[int, int, int]
    variant: tuple[int, ...] = ()

    def key(self, dtype: str) -> str:
        """How tuning.json names the problem. m goes by powers of two: 12608 and 12800 rows want the same tile."""
        m, n, k = self.sizes
        bucket = 1 << max(0, (m - 1).bit_length())
        variant = "".join(f" {value}" for value in self.variant)
        return f"{self.kernel} m{bucket} n{n} k{k}{variant} {dtype}"


def chosen(target: Target, problem: Problem, default: Tile) -> Tile:
    """The tile that tuning found for the problem on this GPU, or else the default."""
    if target.tuning is None:
        return default
    return target.tuning.tiles.get(problem.key(dtype_name(target.dtype)), default)


def attention_tile(target: Target, problem: Problem) -> Tile:
    _, queries, keys = problem.sizes
    widest = max(problem.variant[:2])
    if queries <= 16:
        # one warp with a wide head's sums, or with the bodies of several classes, would spill registers
        default = Tile(16, 64, warps=1, stages=3) if widest <= 32 else Tile(16, 64, warps=2, stages=2)
    elif keys <= ONE_PASS and widest <= 64:
        # a quarter to a third fewer instructions than the loop; wider heads would spill registers on sm_80
        default = Tile(64, ONE_PASS, warps=4, stages=1)
    elif widest <= 96:
        default = Tile(64, 64, warps=4, stages=3 if widest <= 64 else 2)
    else:  # four warps with an accumulator of 128 columns would spill registers on sm_80
        default = Tile(128, 64, warps=8, stages=2)
    return chosen(target, problem, default)


def scores_tile(target: Target, problem: Problem) -> Tile:
    images, queries, keys = problem.sizes
    crowded = images * -(-keys // 64) >= 128
    block_n = 64 if crowded else 16
    few, many = Tile(16, block_n, warps=1, stages=2), Tile(64, block_n, warps=4, stages=2)
    return chosen(target, problem, few if queries <= 16 else many)


def linear_tile(target: Target, problem: Problem) -> Tile:
    """Small tiles while they are needed to occupy the GPU; then as wide as what a block does anew is worth."""
    m, n, k = problem.sizes
    if m <= 512:
        return chosen(target, problem, Tile(block_m=32, block_n=32, block_k=64, warps=4, stages=4))
    if m <= 4096:
        return chosen(target, problem, Tile(block_m=64, block_n=64, block_k=64, warps=4, stages=3))
    if problem.kernel in ("norm_linear", "patch_embed"):
        # A block finds its rows' statistics anew: at 64 columns that is twice the tensor cores' time on an H100. And it
        # reads its pixels anew: ⌈n / block_n⌉ (128 + block_n) columns of k in all, from the L2 cache.
        block_n = 128 if n > 64 else 64
    else:
        # 128 columns take 1.5 times the registers, so that one program fits where two did: worth it for long sums only
        block_n = 128 if k > 512 and -(-n // 64) % 2 == 0 else 64
    return chosen(target, problem, Tile(block_m=128, block_n=block_n, block_k=64, warps=8, stages=3))


def candidates(problem: Problem) -> list[Tile]:
    """What the tuner tries."""
    shapes: tuple[tuple[int, int, int], ...]  # rows, columns, warps
    if problem.kernel == "ragged_attention":
        _, queries, keys = problem.sizes
        few, many = product((16,), (32, 64, 128), (1, 2)), product((32, 64, 128), (32, 64, 128), (2, 4, 8))
        shapes = tuple(few) if queries <= 16 else tuple(s for s in many if 16 <= s[0] // s[2] <= 32)
        loops = product((shape for shape in shapes if shape[1] < keys), (2, 3))  # a tile of all keys is one pass
        looping = [Tile(m, n, warps=warps, stages=stages) for (m, n, warps), stages in loops]
        # one pass: a warp has room for the scores of 16 queries
        rows = () if keys > ONE_PASS else (16,) if queries <= 16 else (32, 64, 128)
        return [Tile(m, ONE_PASS, warps=m // 16, stages=1) for m in rows] + looping
    if problem.kernel in ("norm_linear", "linear", "linear_residual", "patch_embed"):
        small = ((16, 32, 4), (16, 64, 4), (32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4))
        large = ((64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (128, 128, 8), (64, 256, 8), (128, 256, 8))
        shapes, depths = (small, (3, 5)) if problem.sizes[0] <= 1024 else (large, (2, 3, 4))
        return [Tile(m, n, warps=warps, stages=stages) for (m, n, warps), stages in product(shapes, depths)]
    return []
