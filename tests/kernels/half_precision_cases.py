"""Small awkward cases of every op, for the interpreter and for a GPU alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from prunevit_kernels import FusedMlp, LinearResidual, NormLinear, PatchEmbed, PoolHead, SelectTokens
from tests.kernels.half_precision import Buffer, Case, attention_case, scores_case, weights


def outlier_channel(values: Tensor, channel: int = 33) -> Tensor:
    """One residual channel a few hundred times the others, as trained transformers have."""
    values = values.clone()
    values[..., channel] *= 100
    return values


def outlier_first(values: Tensor) -> Tensor:
    return outlier_channel(values, 0)


def norm_linear(
    e: int, d: int, b: int, n: int, reads: Sequence[int] | None = None, fill: Callable[[Tensor], Tensor] = lambda v: v
) -> Case:
    op = NormLinear(e, weights(d, len(reads) if reads else e), weights(d), 1e-6, tuple(reads) if reads else None)
    return Case(op, [Buffer((b, n, e), "read", fill=fill), Buffer((b, n, d), "written")])


def linear_residual(e: int, k: int, b: int, n: int, gamma: bool = False, writes: Sequence[int] | None = None) -> Case:
    d = len(writes) if writes else e
    scale = weights(d) if gamma else None
    op = LinearResidual(e, weights(d, k), weights(d), scale, tuple(writes) if writes else None)
    return Case(op, [Buffer((b, n, k), "read"), Buffer((b, n, e), "updated")])


def fused_mlp(
    e: int,
    f: int,
    b: int,
    n: int,
    act: Literal["gelu", "gelu_tanh", "quick_gelu", "relu"] = "gelu",
    sparse: bool = False,
) -> Case:
    reads = tuple(range(0, e, 2)) if sparse else None
    writes = tuple(range(1, e, 3)) if sparse else None
    r, d = len(reads or range(e)), len(writes or range(e))
    op = FusedMlp(e, weights(f, r), weights(f), weights(d, f), weights(d), act, 1e-6, weights(d), reads, writes)
    return Case(op, [Buffer((b, n, e), "updated")])


def patch_embed(
    e: int,
    patch: tuple[int, int],
    image: tuple[int, int],
    prefix: int,
    b: int,
    norms: tuple[bool, bool] = (False, False),
) -> Case:
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    affine = [weights(2, e, seed=seed) + 1 if on else None for seed, on in enumerate(norms)]
    op = PatchEmbed(weights(e, 3, *patch) / 4, weights(e), weights(patches, e), weights(prefix, e), 1e-6, *affine)
    return Case(op, [Buffer((b, 3, *image), "read"), Buffer((b, prefix + patches, e), "written")])


def pool_head(
    e: int, classes: int | None, pool: Literal["token", "tokens", "avg", "max", "avgmax", "none"], b: int, n: int,
    norm: bool = True, fc_norm: bool = False, prefix: int = 1,
) -> Case:  # fmt: skip
    pooled = 2 * e if pool == "tokens" else e
    weight, bias = (weights(classes, pooled), weights(classes)) if classes else (None, None)
    affine = [weights(2, e, seed=seed) + 1 if on else None for seed, on in enumerate((norm, fc_norm))]
    width = classes or pooled
    out = (b, n, width) if pool == "none" else (b, width)
    op = PoolHead(e, pool, prefix, 1e-6, *affine, weight, bias)
    return Case(op, [Buffer((b, n, e), "read"), Buffer(out, "written")])


def select_tokens(e: int, b: int, n: int, keep: int, prefix: int = 1, fuse: bool = False, ties: bool = False) -> Case:
    op = SelectTokens(e, keep, prefix, fuse)

    def scores(values: Tensor) -> Tensor:
        return (values * (0.5 if ties else 1000)).round().abs() / 1000  # exact in fp32, and often equal with ties

    return Case(
        op,
        [
            Buffer((b, n, e), "read"),
            Buffer((b, n), "read", torch.float32, scores),
            Buffer((b, op.out_tokens, e), "written"),
            Buffer((b, op.out_tokens), "written", torch.float32),
        ],
    )


CASES: dict[str, dict[str, Case]] = {
    "ragged_attention": {
        "one_head_13_by_12": attention_case([13], [12], b=2, n=21),
        "one_token": attention_case([8], [8], b=1, n=1),
        "whole_tile_of_keys": attention_case([16], [16], b=1, n=64),
        "tails_of_32_and_16": attention_case([20], [19], b=1, n=105),
        "head_of_48_is_32_and_16": attention_case([39, 39], [48, 41], b=1, n=70),
        "mixed_up_to_64": attention_case([5, 57, 16, 64], [48, 40, 8, 5], b=1, n=67),
        "mixed_up_to_32": attention_case([5, 25], [19, 3], b=2, n=17),
        "mixed_up_to_128": attention_case([100, 5], [9, 70], b=1, n=20),
        "head_of_128": attention_case([128], [80], b=1, n=33),
        "one_query": attention_case([25, 13], [31, 12], b=3, n=67, queries=1),
        "one_query_of_wide_heads": attention_case([100, 64], [128, 40], b=1, n=147, queries=1),
        "fewer_queries_than_keys": attention_case([13], [12], b=2, n=70, queries=66),
        "all_that_one_pass_takes": attention_case([13, 40], [12, 19], b=1, n=256, queries=20),
        "one_key_in_the_last_tile": attention_case([25], [38], b=1, n=193, queries=65),
        "more_than_one_pass_takes": attention_case([13, 9], [12, 16], b=1, n=297, queries=17),
        "two_steps_of_a_wide_head": attention_case([96], [80], b=1, n=150, queries=17),
    },
    "norm_linear": {
        "width_21": norm_linear(21, 40, b=2, n=5),
        "width_64": norm_linear(64, 16, b=1, n=33),
        "width_89_to_35": norm_linear(89, 35, b=1, n=3),
        "one_channel": norm_linear(1, 8, b=1, n=2),
        "outlier_channel": norm_linear(100, 24, b=1, n=20, fill=outlier_channel),
        "outlier_first": norm_linear(100, 24, b=1, n=20, fill=outlier_first),
        "reads_some": norm_linear(72, 24, b=1, n=9, reads=[0, 3, 4, 40, 71]),
    },
    "linear_residual": {
        "width_21": linear_residual(21, 24, b=2, n=5),
        "width_40_from_89": linear_residual(40, 89, b=1, n=33),
        "gamma": linear_residual(35, 13, b=1, n=4, gamma=True),
        "writes_some": linear_residual(37, 16, b=1, n=5, gamma=True, writes=[36, 1, 2, 17]),
    },
    "fused_mlp": {
        "21_by_37": fused_mlp(21, 37, b=2, n=5),
        "72_by_1": fused_mlp(72, 1, b=1, n=3, act="relu"),
        "gelu_tanh": fused_mlp(16, 24, b=1, n=3, act="gelu_tanh"),
        "quick_gelu": fused_mlp(16, 24, b=1, n=3, act="quick_gelu"),
        "reads_and_writes_some": fused_mlp(24, 16, b=1, n=9, sparse=True),
    },
    "patch_embed": {
        "patch_16": patch_embed(24, (16, 16), (32, 48), 1, b=2),
        "patch_14": patch_embed(21, (14, 14), (28, 42), 5, b=1),
        "patch_2_by_4": patch_embed(16, (2, 4), (5, 9), 0, b=2),
        "pre_norm": patch_embed(21, (8, 8), (16, 16), 1, b=2, norms=(False, True)),
        "both_norms": patch_embed(21, (8, 8), (16, 16), 2, b=1, norms=(True, True)),
    },
    "pool_head": {
        "token": pool_head(21, 10, "token", b=3, n=5),
        "tokens": pool_head(21, 10, "tokens", b=3, n=5),
        "avg": pool_head(24, 10, "avg", b=2, n=20, fc_norm=True),
        "max": pool_head(21, 10, "max", b=2, n=5, norm=False),
        "avgmax": pool_head(21, 10, "avgmax", b=2, n=5, norm=False, fc_norm=True, prefix=0),
        "token_through_two_norms": pool_head(21, 10, "token", b=3, n=5, fc_norm=True),
        "every_token": pool_head(21, 16, "none", b=2, n=5),
        "features": pool_head(21, None, "avg", b=2, n=5),
        "features_of_every_token": pool_head(21, None, "none", b=2, n=5),
        "features_of_two_tokens": pool_head(24, None, "tokens", b=2, n=5),
    },
    "token_scores": {
        "most_of_any_query": scores_case([13, 40], 2, 37, "max_attention", add=False),
        "class_token": scores_case([13, 40, 5], 2, 37, "class_attention", add=True),
        "one_token": scores_case([8], 1, 1, "max_attention", add=True),
    },
    "select_tokens": {
        "keeps_some": select_tokens(21, b=2, n=19, keep=7),
        "keeps_all": select_tokens(21, b=1, n=19, keep=18),
        "longer_than_a_tile": select_tokens(24, b=1, n=140, keep=70, prefix=2),
        "ties": select_tokens(21, b=2, n=70, keep=30, ties=True),
        "fuses_the_dropped": select_tokens(21, b=2, n=19, keep=7, fuse=True),
        "no_prefix": select_tokens(16, b=1, n=9, keep=1, prefix=0, fuse=True),
    },
}
EVERY_CASE = [f"{op}.{name}" for op, cases in CASES.items() for name in cases]


def named(name: str) -> Case:
    op, case = name.split(".")
    return CASES[op][case]
