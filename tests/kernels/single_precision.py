"""What the C++ kernels are checked on: small awkward shapes, every published shape, and shapes that hypothesis draws.

The rule is the one of ``half_precision`` in fp32: against fp64, at most twice eager's own error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hypothesis import HealthCheck, settings

from prunevit import shapes
from prunevit_kernels import Target
from tests.kernels.half_precision import Case, attention_case, check, scores_case
from tests.kernels.half_precision_cases import CASES, fused_mlp, linear_residual, norm_linear, patch_embed, pool_head

CPU = Target("cpu", threads=2)

# Drawn shapes are reproducible, and a failing one is printed; no deadline, since the machine may be busy.
drawn = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


def run(case: Case) -> None:
    check(case, CPU, units=1)


def run_drawn(case: Case, threads: int = 2) -> None:
    """With more room: on an output of a few numbers, eager's own error may be nearly zero by luck, and the baseline
    instruction set rounds twice where eager fuses."""
    check(case, CPU if threads == 2 else Target("cpu", threads=threads), units=16)


def blocks() -> dict[str, tuple[int, list[int], list[int], int]]:
    """Embedding width, query-key widths, value widths and MLP width of every published block, no two alike."""
    found: dict[str, tuple[int, list[int], list[int], int]] = {}
    for name in shapes.names():
        spec = shapes.get(name)
        for i, block in enumerate(spec.blocks):
            shape = (spec.embed_dim, list(block.qk_dims), list(block.v_dims), block.mlp_dim)
            if shape not in found.values():
                found[f"{name}.block{i}"] = shape
    return found


def _attention(e: int, qk: list[int], v: list[int], f: int) -> Case:
    return attention_case(qk, v, b=1, n=197)


def _norm_linear(e: int, qk: list[int], v: list[int], f: int) -> Case:
    return norm_linear(e, 2 * sum(qk) + sum(v), b=1, n=53)


def _linear_residual(e: int, qk: list[int], v: list[int], f: int) -> Case:
    return linear_residual(e, sum(v), b=1, n=53)


def _fused_mlp(e: int, qk: list[int], v: list[int], f: int) -> Case:
    return fused_mlp(e, f, b=1, n=53)


PUBLISHED: dict[str, Callable[[int, list[int], list[int], int], Case]] = {
    "ragged_attention": _attention,
    "norm_linear": _norm_linear,
    "linear_residual": _linear_residual,
    "fused_mlp": _fused_mlp,
}

# Rows enough for blocks of rows; widths around a vector, a panel and a block of k; keys for several blocks of keys.
LARGE: dict[str, dict[str, Callable[[], Case]]] = {
    "ragged_attention": {
        "keys_in_three_blocks": partial(attention_case, [13, 40], [12, 51], 1, 577),
        "keys_in_five_blocks_one_query": partial(attention_case, [20], [38], 1, 1025, 1),
        "many_images": partial(attention_case, [13, 5, 8], [12, 16, 3], 9, 35),
        "many_keys": partial(attention_case, [64], [64], 1, 4097, 100),
    },
    "norm_linear": {
        "a_lone_third_vector": partial(norm_linear, 33, 33, 2, 60),
        "one_row": partial(norm_linear, 345, 228, 1, 1),
        "k_in_four_blocks": partial(norm_linear, 1300, 49, 1, 100),
        "four_blocks_of_rows": partial(norm_linear, 40, 65, 2, 197),
    },
    "linear_residual": {
        "one_row": partial(linear_residual, 307, 72, 1, 1),
        "k_in_three_blocks": partial(linear_residual, 65, 1152, 1, 100, True),
        "writes_from_k_in_blocks": partial(linear_residual, 65, 800, 1, 100, True, [64, *range(40)]),
        "four_blocks_of_rows": partial(linear_residual, 40, 65, 2, 197),
    },
    "fused_mlp": {
        "one_row": partial(fused_mlp, 307, 613, 1, 1),
        "one_hidden": partial(fused_mlp, 33, 1, 1, 60),
        "three_chunks_reads_and_writes_some": partial(fused_mlp, 60, 613, 1, 100, "gelu", True),
        "four_blocks_of_rows": partial(fused_mlp, 40, 289, 2, 197),
        "relu": partial(fused_mlp, 40, 100, 1, 60, "relu"),
        "tanh": partial(fused_mlp, 40, 100, 1, 60, "gelu_tanh"),
        "quick": partial(fused_mlp, 40, 100, 1, 60, "quick_gelu"),
    },
    "patch_embed": {
        "deit_patches": partial(patch_embed, 153, (16, 16), (224, 224), 1, 1),
        "images_across_row_blocks": partial(patch_embed, 33, (4, 4), (32, 36), 2, 3, (True, False)),
    },
    "pool_head": {
        "imagenet": partial(pool_head, 153, 1000, "token", 2, 197),
        "every_token_of_many": partial(pool_head, 21, 33, "none", 2, 80, fc_norm=True),
        "mean": partial(pool_head, 192, None, "avg", 2, 197, norm=False),
        "mean_of_many": partial(pool_head, 65, 33, "avgmax", 2, 4097, fc_norm=True),
    },
    "token_scores": {
        "published": partial(scores_case, [13] * 6, 1, 197, "max_attention", False),
        "classes": partial(scores_case, [39] * 3, 2, 197, "class_attention", True),
    },
}


def cases(op: str) -> dict[str, Callable[[], Case]]:
    """Every named case of an op, not yet made: weights take memory."""
    found: dict[str, Callable[[], Case]] = {name: partial(lambda case: case, case) for name, case in CASES[op].items()}
    found |= LARGE.get(op, {})
    if op in PUBLISHED:
        for name, (e, qk, v, f) in blocks().items():
            if f if op == "fused_mlp" else qk:
                found[name] = partial(PUBLISHED[op], e, qk, v, f)
    return found
