"""Every kernel on a GPU: against fp64, in poisoned buffers, in graphs, on concurrent streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunevit_kernels import Launch, Target
from tests.kernels.half_precision import Case, attention_case, check, draw, place, same_bits, scores_case
from tests.kernels.half_precision_cases import (
    EVERY_CASE,
    fused_mlp,
    linear_residual,
    named,
    norm_linear,
    patch_embed,
    pool_head,
    select_tokens,
)
from tests.sanitizer import finds_nothing

pytestmark = pytest.mark.gpu

KERNELS = ("norm_linear_kernel", "linear_residual_kernel", "ragged_attention", "patch_embed", "tokens_kernel", "_kept_")

# Sizes of published pruned models: what the interpreter is too slow for.
PUBLISHED: dict[str, Case] = {
    "snp_deit_tiny.block0.attention": attention_case([39] * 3, [51] * 3, b=4, n=197),
    "snp_deit_small.block0.attention": attention_case([25] * 6, [51] * 6, b=4, n=197),
    "snp_deit_small_1g3.block4.attention": attention_case([13] * 6, [12] * 6, b=16, n=197),
    "savit_deit_base.block3.attention": attention_case([64] * 10, [64] * 10, b=2, n=197),
    "ragged_deit_small.block4.attention": attention_case([5, 57, 8, 16, 64, 64], [48, 40, 27, 40, 24, 55], b=4, n=197),
    "ragged_deit_small.block11.last_query": attention_case([57, 16, 40], [8, 8, 24], b=8, n=197, queries=1),
    "577_tokens": attention_case([80] * 4, [80] * 4, b=2, n=577),
    "1025_tokens": attention_case([64, 20], [33, 64], b=1, n=1025),
    "4097_tokens": attention_case([25], [38], b=1, n=4097),
    "snp_deit_tiny.qkv": norm_linear(153, 384, b=2, n=197),
    "snp_deit_small.qkv": norm_linear(307, 528, b=64, n=197),
    "deit_base.qkv": norm_linear(768, 2304, b=8, n=197),
    "snp_deit_small.proj": linear_residual(307, 312, b=24, n=197),
    "snp_deit_small.mlp": fused_mlp(307, 1228, b=24, n=197),
    "snp_deit_small_1g3.mlp": fused_mlp(345, 307, b=1, n=197),
    "ragged_deit_small.block5.mlp": fused_mlp(384, 77, b=24, n=197),
    "snp_deit_small.patch_embed": patch_embed(307, (16, 16), (224, 224), 1, b=8),
    "dinov2.patch_embed": patch_embed(384, (14, 14), (518, 518), 1, b=1),
    "snp_deit_small.head": pool_head(307, 1000, "token", b=8, n=197),
    "deit_distilled.head": pool_head(192, 1000, "tokens", b=8, n=198),
    "beit.head": pool_head(768, 1000, "avg", b=8, n=197, norm=False, fc_norm=True),
    "cp_vit.scores": scores_case([25] * 6, 8, 197, "max_attention", add=True),
    "evit.scores": scores_case([64] * 6, 8, 197, "class_attention", add=False),
    "4097_tokens.scores": scores_case([13], 1, 4097, "max_attention", add=False),
    "evit.select": select_tokens(384, b=8, n=197, keep=137, fuse=True),
    "4097_tokens.select": select_tokens(64, b=1, n=4097, keep=2000, ties=True),
}
SCRATCH = ["fused_mlp.21_by_37", "pool_head.avg", "token_scores.most_of_any_query", "select_tokens.fuses_the_dropped"]


def captured(launch: Launch) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def in_a_graph(launch: Launch) -> None:
    captured(launch).replay()
    torch.cuda.synchronize()


def bound(case: Case, target: Target, seed: int = 0) -> tuple[Launch, list[Tensor]]:
    views, _ = place(case, target, draw(case, target, seed))
    return case.op.pack(target).bind(*views), views


@pytest.mark.parametrize("name", EVERY_CASE)
def test_small_and_awkward(name: str, target: Target) -> None:
    check(named(name), target)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str, target: Target) -> None:
    check(PUBLISHED[name], target)


@pytest.mark.parametrize("name", EVERY_CASE)
def test_captured_without_a_warm_up(name: str, target: Target) -> None:
    """bind has compiled and loaded every kernel: nothing is left that a capture forbids."""
    check(named(name), target, run=in_a_graph)


@pytest.mark.parametrize("name", PUBLISHED)
def test_replay_is_eager_bit_for_bit(name: str, target: Target) -> None:
    eager, eager_views = bound(PUBLISHED[name], target)
    launch, views = bound(PUBLISHED[name], target)
    eager()
    in_a_graph(launch)
    assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(views, eager_views))


@pytest.mark.parametrize("name", EVERY_CASE)
def test_a_launch_allocates_nothing(name: str, target: Target) -> None:
    launch, _ = bound(named(name), target)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    launch()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("name", SCRATCH)
def test_streams_do_not_share_scratch(name: str, target: Target) -> None:
    """Two sets of buffers, launched many times on two streams at once, as when each had the GPU to itself."""
    case = named(name)
    alone = []
    for seed in (0, 1):
        launch, views = bound(case, target, seed)
        for _ in range(50):
            launch()
        torch.cuda.synchronize()
        alone.append([view.clone() for view in views])

    pairs = [bound(case, target, seed) for seed in (0, 1)]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(50):
        for (launch, _), stream in zip(pairs, streams):
            with torch.cuda.stream(stream):
                launch()
    torch.cuda.synchronize()
    for (_, views), expected in zip(pairs, alone):
        assert all(same_bits(a.contiguous(), b.contiguous()) for a, b in zip(views, expected))


@pytest.mark.timeout(300)
def test_compute_sanitizer_finds_nothing() -> None:
    tests = (f"{__file__}::test_small_and_awkward", "-k", "bf16 and (mixed or 21 or some or patch)")
    finds_nothing("memcheck", KERNELS, *tests)
