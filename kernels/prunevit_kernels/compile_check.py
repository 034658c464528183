"""``python -m prunevit_kernels.compile_check``: compile the Triton kernels for absent GPUs and report what came out.

The instances have the sizes of published pruned models. The exit status is 1 where a build breaks a limit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from . import (
    FusedMlp,
    HeadTable,
    LinearResidual,
    NormLinear,
    Op,
    PatchEmbed,
    PoolHead,
    RaggedAttention,
    SelectTokens,
    Target,
    TokenScores,
)
from ._aot import Build, build, compiling_for
from ._launch import Call, TritonOp

ARCHITECTURES = (80, 90)
SHARED_LIMIT = 99 * 1024  # of a block on sm_86 and sm_89; sm_80 and sm_90 have more
TENSOR_CORE_KERNELS = (
    "ragged_attention_kernel", "norm_linear_kernel", "linear_residual_kernel", "patch_embed_kernel",
    "softmax_sums_kernel", "token_scores_kernel",
)  # fmt: skip


@dataclass(frozen=True)
class Instance:
    """An op of some published size, and the shapes of its buffers."""

    op: Op
    shapes: tuple[tuple[int, ...], ...]
    fp32: tuple[int, ...] = ()
    """Which of the buffers are fp32."""

    def calls(self, target: Target) -> list[Call]:
        packed = self.op.pack(target)
        assert isinstance(packed, TritonOp)
        buffers = [self._buffer(i, shape, target) for i, shape in enumerate(self.shapes)]
        self.op.check(target, *buffers)
        return packed.calls(*buffers)

    def _buffer(self, i: int, shape: tuple[int, ...], target: Target) -> Tensor:
        dtype = torch.float32 if i in self.fp32 else target.dtype
        width = shape[-1] if len(shape) == 4 else target.pitch(shape[-1])
        return torch.empty(*shape[:-1], width, dtype=dtype)[..., : shape[-1]]


def attention(qk: tuple[int, ...], v: tuple[int, ...], b: int, n: int, queries: int | None = None) -> Instance:
    heads = HeadTable.packed(qk, v, align=8)
    return Instance(RaggedAttention(heads), ((b, n, heads.width), (b, queries or n, heads.out_width)))


def norm_linear(e: int, d: int, b: int) -> Instance:
    return Instance(NormLinear(e, torch.zeros(d, e), None, 1e-6), ((b, 197, e), (b, 197, d)))


def linear_residual(e: int, k: int, b: int) -> Instance:
    return Instance(LinearResidual(e, torch.zeros(e, k), None), ((b, 197, k), (b, 197, e)))


def fused_mlp(e: int, f: int, b: int) -> Instance:
    return Instance(FusedMlp(e, torch.zeros(f, e), None, torch.zeros(e, f), None, "gelu", 1e-6), ((b, 197, e),))


def patch_embed(e: int, b: int) -> Instance:
    op = PatchEmbed(torch.zeros(e, 3, 16, 16), None, torch.zeros(196, e), torch.zeros(1, e), 1e-6)
    return Instance(op, ((b, 3, 224, 224), (b, 197, e)))


def pool_head(e: int, b: int) -> Instance:
    op = PoolHead(e, "avg", 1, 1e-6, None, torch.zeros(2, e), torch.zeros(1000, e), torch.zeros(1000))
    return Instance(op, ((b, 197, e), (b, 1000)))


def token_scores(qk: tuple[int, ...], b: int) -> Instance:
    heads = HeadTable.packed(qk, qk, align=8)
    return Instance(TokenScores(heads, "max_attention"), ((b, 197, heads.width), (b, 197)), fp32=(1,))


def select_tokens(e: int, b: int) -> Instance:
    return Instance(SelectTokens(e, 98, 1, fuse=True), ((b, 197, e), (b, 197), (b, 100, e), (b, 100)), fp32=(1, 3))


# A case is a call that makes the instance: weights of a hundred layers are not held at once.
INSTANCES: dict[str, Callable[[], Instance]] = {
    "ragged_attention 6×(13, 12)": lambda: attention((13,) * 6, (12,) * 6, 64, 197),
    "ragged_attention 6×(25, 38)": lambda: attention((25,) * 6, (38,) * 6, 64, 197),
    "ragged_attention 3×(39, 51)": lambda: attention((39,) * 3, (51,) * 3, 64, 197),
    "ragged_attention 12×(64, 64)": lambda: attention((64,) * 12, (64,) * 12, 64, 197),
    "ragged_attention 16×(80, 80), 577 tokens": lambda: attention((80,) * 16, (80,) * 16, 8, 577),
    "ragged_attention mixed to 64": lambda: attention((5, 57, 8, 16, 64, 64), (48, 40, 27, 40, 24, 55), 64, 197),
    "ragged_attention mixed to 32": lambda: attention((5, 20, 13), (8, 31, 12), 64, 197),
    "ragged_attention mixed to 128": lambda: attention((100, 20, 13), (8, 128, 12), 64, 197),
    "ragged_attention 6×(13, 12), one query": lambda: attention((13,) * 6, (12,) * 6, 64, 197, 1),
    "ragged_attention 12×(64, 64), one query, 256 tokens": lambda: attention((64,) * 12, (64,) * 12, 64, 256, 1),
    "ragged_attention mixed to 64, one query, 256 tokens": lambda: attention((57, 5), (40, 64), 64, 256, 1),
    "ragged_attention mixed to 128, one query": lambda: attention((100, 20, 13), (8, 128, 12), 64, 197, 1),
    "ragged_attention 12×(64, 64), 256 tokens": lambda: attention((64,) * 12, (64,) * 12, 64, 256),
    "ragged_attention mixed to 64, 256 tokens": lambda: attention((13, 57, 5, 24), (40, 64, 48, 12), 64, 256),
    "ragged_attention 6×(13, 12), 577 tokens": lambda: attention((13,) * 6, (12,) * 6, 64, 577),
    "ragged_attention mixed to 64, 577 tokens": lambda: attention((13, 57, 5, 24), (40, 64, 48, 12), 64, 577),
    "norm_linear 153 → 384, batch 1": lambda: norm_linear(153, 384, 1),
    "norm_linear 307 → 528, batch 64": lambda: norm_linear(307, 528, 64),
    "norm_linear 384 → 1152, batch 256": lambda: norm_linear(384, 1152, 256),
    "linear_residual 192 → 307, batch 1": lambda: linear_residual(307, 192, 1),
    "linear_residual 96 → 345, batch 64": lambda: linear_residual(345, 96, 64),
    "fused_mlp 345, 307, batch 1": lambda: fused_mlp(345, 307, 1),
    "fused_mlp 307, 1228, batch 64": lambda: fused_mlp(307, 1228, 64),
    "patch_embed 307, batch 1": lambda: patch_embed(307, 1),
    "patch_embed 384, batch 64": lambda: patch_embed(384, 64),
    "pool_head 345, batch 64": lambda: pool_head(345, 64),
    "token_scores 6×25, batch 64": lambda: token_scores((25,) * 6, 64),
    "select_tokens 384, batch 64": lambda: select_tokens(384, 64),
}


def faults(made: Build) -> list[str]:
    """What is wrong with a build; nothing of it depends on a machine."""
    found = []
    if made.spilled or made.stack:
        found.append(f"{made.spilled} accesses to local memory, a stack of {made.stack} bytes")
    if made.shared > SHARED_LIMIT:
        found.append(f"{made.shared} bytes of shared memory, more than {SHARED_LIMIT}")
    if made.registers * made.threads > 65536:
        found.append(f"{made.registers} registers in {made.threads} threads do not fit")
    if made.narrow_copies and made.name != "token_scores_kernel":  # which also fetches one fp32 a query
        found.append(f"{made.narrow_copies} async copies narrower than 16 bytes")
    if made.serialised:
        found.append("wgmma products that wait for one another")
    if made.name in TENSOR_CORE_KERNELS:
        if not made.tensor_core:
            found.append("no tensor-core instruction")
        if not made.async_copies + made.wide_loads:  # without a loop there is nothing to copy ahead of
            found.append("no 16-byte copy, nor load")
    return found


def builds(names: list[str], arch: int, dtype: torch.dtype) -> Iterator[tuple[str, Build]]:
    with compiling_for(arch, dtype) as target:
        for name in names:
            for call in INSTANCES[name]().calls(target):
                yield name, build(call)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prunevit_kernels.compile_check", description=__doc__)
    parser.add_argument("--only", default="", help="instances whose name contains this")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES), metavar="80")
    parser.add_argument("--dtype", nargs="+", choices=("float16", "bfloat16"), default=["bfloat16"])
    options = parser.parse_args(arguments)
    names = [name for name in INSTANCES if options.only in name]
    columns = (
        "instance", "kernel", "sm", "dtype", "registers × threads", "shared", "MMA", "of it wgmma", "16-byte copies",
        "instructions", "a step",
    )  # fmt: skip
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    broken = 0
    for arch, dtype in product(options.arch, options.dtype):
        for name, made in builds(names, arch, getattr(torch, dtype)):
            print(
                f"| {name} | {made.name.removesuffix('_kernel')} | {arch} | {dtype} | {made.registers} × {made.threads}"
                f" | {made.shared} | {made.tensor_core} | {made.wgmma} | {made.async_copies}"
                f" | {made.instructions} | {made.step} |",
                flush=True,
            )
            for fault in faults(made):
                print(f"{name}, sm_{arch}, {made.name}: {fault}", file=sys.stderr)
                broken += 1
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
