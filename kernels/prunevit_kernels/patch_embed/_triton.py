"""patch_embed on NVIDIA GPUs: a product that reads patches where they lie in the image.

A patch's column k is pixel (c, p, q). Weights are packed with q padded to a power of two, so that one run of pixels
is one run of columns: 16-byte copies where patch and image widths are multiples of 8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._configs import Problem, linear_tile
from .._launch import Call, TritonOp, expect_rows
from .._linear import BLOCK_K, store_columns
from .._overlap import await_launches
from .._rows import layer_norm, packed_affine, rows_tile
from ..target import Launch, Target
from ..units import round_up
from . import PatchEmbed


@triton.jit(do_not_specialize=["B", "GRID_H", "GRID_W", "E", "K", "PREFIX", "w_row8", "x_image8", "x_row8"])
def patch_embed_kernel(
    images, w, added, prefix, x, B, CHANNELS, HEIGHT, WIDTH, GRID_H, GRID_W, E, K, PREFIX, w_row8, x_image8, x_row8,
    P: tl.constexpr, Q: tl.constexpr, Q_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tokens = patches Wᵀ + added, behind the prefix tokens. The last programs write the prefix."""
    await_launches(PDL)
    patches = GRID_H * GRID_W
    blocks = tl.cdiv(E, BLOCK_N)
    row_block = tl.program_id(0) // blocks
    first_col = tl.program_id(0) % blocks * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    patch_blocks = tl.cdiv(B * patches, BLOCK_M)
    if row_block < patch_blocks:
        # locate
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        present = rows < B * patches
        rows = tl.minimum(rows, B * patches - 1)
        image = (rows // patches).to(tl.int64)
        patch = rows % patches
        corner = image * CHANNELS * HEIGHT * WIDTH + (patch // GRID_W * P) * WIDTH + patch % GRID_W * Q
        w_rows = w + tl.minimum(cols, E - 1) * (w_row8 * 8)

        # load and multiply
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            k = first + tl.arange(0, BLOCK_K)
            line = k // Q_PADDED  # of P lines in each channel
            q = k % Q_PADDED
            pixel = (line // P * HEIGHT + line % P) * WIDTH + q
            # lines past the last channel are padding of the weight
            inside = line < CHANNELS * P
            if Q != Q_PADDED:
                inside = inside & (q < Q)
            pixels = tl.load(images + corner[:, None] + pixel[None, :], mask=inside[None, :], other=0.0)
            acc = tl.dot(pixels, tl.load(w_rows[None, :] + k[:, None]), acc)

        # finish in fp32, store
        acc += tl.load(added + patch[:, None] * E + cols[None, :], mask=(cols < E)[None, :], other=0.0)
        x_rows = x + image * x_image8 * 8 + (PREFIX + patch) * (x_row8 * 8)
        store_columns(x_rows, first_col, E, present, acc, BLOCK_N)
    else:
        rows = (row_block - patch_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        token = rows % PREFIX
        values = tl.load(prefix + token[:, None] * E + cols[None, :], mask=(cols < E)[None, :], other=0.0)
        x_rows = x + (rows // PREFIX).to(tl.int64) * x_image8 * 8 + token * (x_row8 * 8)
        store_columns(x_rows, first_col, E, rows < B * PREFIX, values, BLOCK_N)


@triton.jit(do_not_specialize=["ROWS", "N", "E", "PREFIX", "x_image8", "x_row8"])
def norm_tokens_kernel(
    x, positions, embed_affine, pre_affine, ROWS, N, E, PREFIX, x_image8, x_row8, eps,
    EMBED_NORM: tl.constexpr, PRE_NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """In place: patches ← LN(patches) + positions, then all tokens ← LN(tokens), as far as the model has them."""
    await_launches(PDL)
    # locate
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    present = rows < ROWS
    rows = tl.minimum(rows, ROWS - 1)
    token = rows % N
    cols = tl.arange(0, BLOCK_N)
    x_rows = x + (rows // N).to(tl.int64) * x_image8 * 8 + token * (x_row8 * 8)

    # load
    groups = (cols < tl.cdiv(E, 8) * 8)[None, :]
    values = tl.load(x_rows[:, None] + cols[None, :], mask=groups, other=0.0).to(tl.float32)

    # compute in fp32
    if EMBED_NORM:
        is_patch = (token >= PREFIX)[:, None]
        places = positions + (token - PREFIX)[:, None] * E + cols[None, :]
        normed = layer_norm(values, cols, E, embed_affine, eps)
        normed += tl.load(places, mask=is_patch & (cols < E)[None, :], other=0.0)
        values = tl.where(is_patch, normed, values)
    if PRE_NORM:
        values = layer_norm(values, cols, E, pre_affine, eps)

    # store
    store_columns(x_rows, 0, E, present, values, BLOCK_N)


def aligned(images: Tensor) -> Tensor:
    return images if images.data_ptr() % 16 == 0 else images.clone()


class Packed(TritonOp[PatchEmbed]):
    def __init__(self, op: PatchEmbed, target: Target) -> None:
        super().__init__(op, target)
        device = target.device
        e, channels, p, q = op.weight.shape
        self.q_padded = 1 << (q - 1).bit_length()
        lines = torch.zeros(e, channels * p, self.q_padded)
        lines[:, :, :q] = op.weight.detach().reshape(e, channels * p, q)
        self.columns = round_up(channels * p * self.q_padded, BLOCK_K)
        self.weight = torch.zeros(e, self.columns, device=device, dtype=target.dtype)
        self.weight[:, : channels * p * self.q_padded] = lines.flatten(1).to(device)
        self.positions = op.positions.detach().to(device, torch.float32).contiguous()
        bias = torch.zeros(e) if op.bias is None else op.bias.detach()
        # a norm between the patches and their positions: the product adds the bias alone
        added = self.positions if op.embed_norm is None else torch.zeros_like(self.positions)
        self.added = (added + bias.to(device, torch.float32)).contiguous()
        self.prefix = op.prefix.detach().to(device, torch.float32).contiguous()
        self.norms = packed_affine(op.embed_norm, device), packed_affine(op.pre_norm, device)

    def rebindable(self, first: Tensor, *rest: Tensor) -> Callable[[Tensor], Launch]:
        """Launches on any images like ``first``. What is compiled reads 16 bytes at a time: others are copied."""
        embed, *norms = self.load(aligned(first), *rest)
        launch, fixed = partial(embed.func, **embed.keywords), embed.args[1:]  # the first images may go

        def launch_on(images: Tensor) -> Launch:
            return self.launch([partial(launch, aligned(images), *fixed), *norms])

        return launch_on

    def calls(self, images: Tensor, x: Tensor) -> list[Call]:
        expect_rows("x", x)
        b, channels, height, width = images.shape
        e, _, p, q = self.op.weight.shape
        grid_h, grid_w, prefix = height // p, width // q, len(self.prefix)
        pitches = [stride // 8 for stride in (self.weight.stride(0), x.stride(0), x.stride(1))]
        problem = Problem("patch_embed", (b * grid_h * grid_w, e, self.columns))
        tile = linear_tile(self.target, problem)
        row_blocks = -(-b * grid_h * grid_w // tile.block_m) + -(-b * prefix // tile.block_m)
        args = (
            images, self.weight, self.added, self.prefix if prefix else self.added, x,
            b, channels, height, width, grid_h, grid_w, e, self.columns, prefix, *pitches,
        )  # fmt: skip
        constants = {
            "P": p, "Q": q, "Q_PADDED": self.q_padded,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
            "PDL": self.target.overlaps,
        }  # fmt: skip
        calls = [Call(patch_embed_kernel, row_blocks * -(-e // tile.block_n), args, constants, tile, problem)]
        if any(norm is not None for norm in self.norms):
            calls.append(self._norms(x))
        return calls

    def _norms(self, x: Tensor) -> Call:
        b, n, e = x.shape
        embed_norm, pre_norm = self.norms
        tile = rows_tile(e)
        args = (
            x, self.positions, self.added if embed_norm is None else embed_norm,
            self.added if pre_norm is None else pre_norm,
            b * n, n, e, len(self.prefix), x.stride(0) // 8, x.stride(1) // 8, self.op.eps,
        )  # fmt: skip
        constants = {
            "EMBED_NORM": embed_norm is not None, "PRE_NORM": pre_norm is not None,
            "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "PDL": self.target.overlaps,
        }  # fmt: skip
        return Call(
            norm_tokens_kernel, -(-b * n // tile.block_m), args, constants, tile, Problem("rows", (b * n, e, e))
        )
