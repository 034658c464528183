"""SNP against slow transcriptions of its formulas, its invariances, and what must go first."""

from __future__ import annotations

import time

import pytest
import torch

from prunevit import shapes
from prunevit.errors import PruningError
from prunevit.models import PrunedViT
from prunevit.pruning import Plan, compact, groups_of, prune
from prunevit.pruning.snp import SNP, preserved_scores, redundancy
from tests.specs import SPECS, random_images, random_model


def transcribed_pairs(q: torch.Tensor, k: torch.Tensor, gamma: int) -> list[float]:
    """One image, the N×N matrix and all: cos(σ_j u_j v_jᵀ, q_i k_iᵀ) by its definition."""
    u, sigma, vh = torch.linalg.svd(q @ k.T)
    scores = []
    for i in range(q.shape[1]):
        own, total = torch.outer(q[:, i], k[:, i]), 0.0
        for j in range(gamma):
            leading = sigma[j] * torch.outer(u[:, j], vh[j])
            total += float((own * leading).sum().abs() / (own.norm() * leading.norm()))
        scores.append(total)
    return scores


@pytest.mark.parametrize("width", [1, 5, 13, 16])
def test_pairs_without_the_attention_matrix(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    q, k = (torch.randn(3, 13, width, generator=generator, dtype=torch.float64) + 3 for _ in range(2))
    for gamma in (1, min(width, 4)):
        got = preserved_scores(q, k, gamma, 1.0)
        want = torch.tensor([transcribed_pairs(q[b], k[b], gamma) for b in range(3)], dtype=torch.float64)
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_gamma_follows_the_energy() -> None:
    q, k = (torch.randn(2, 20, 6, dtype=torch.float64) for _ in range(2))
    sigma = torch.linalg.svdvals(q @ k.mT)[:, :6].square()
    held = sigma.cumsum(-1) / sigma.sum(-1, keepdim=True)
    got = preserved_scores(q, k, None, 0.7)
    for b in range(2):
        gamma = int((held[b] < 0.7).sum()) + 1
        torch.testing.assert_close(got[b], preserved_scores(q, k, gamma, 1.0)[b])


def test_scores_are_averaged_over_images_and_independent_of_batches() -> None:
    model = random_model(SPECS["every_head_its_own_width"]).double()
    images = random_images(model.spec, 6).double()
    groups = groups_of(model.spec, ("qk",))
    whole = SNP(images=6).score(model, groups, [images], 0)
    apart = SNP(images=5).score(model, groups, [images[:2], images[2:]], 0)
    each = [SNP().score(model, groups, [images[b : b + 1]], 0) for b in range(6)]
    for group in groups:
        torch.testing.assert_close(whole[group], torch.stack([scores[group] for scores in each]).mean(0))
        torch.testing.assert_close(apart[group], torch.stack([scores[group] for scores in each[:5]]).mean(0))


def test_values_are_compared_across_the_heads_of_a_layer() -> None:
    model = random_model(SPECS["every_head_its_own_width"])
    block = model.spec.blocks[0]
    rows = model.blocks[0].attn.qkv.weight[2 * sum(block.qk_dims) :].detach()
    heads = rows.split(list(block.v_dims))
    scores = SNP().score(model, groups_of(model.spec, ("v",)), None, 0)
    for group, got in scores.items():
        if group.block != 0:
            continue
        for i, row in enumerate(heads[group.head]):
            want = sum(1 - abs(float(torch.cosine_similarity(row, other, dim=0))) for head in heads for other in head)
            assert float(got[i]) == pytest.approx(want, rel=1e-4)


def test_permuting_neurons_permutes_scores() -> None:
    rows, order = torch.randn(9, 5), torch.randperm(9)
    torch.testing.assert_close(redundancy(rows[order], rows[order]), redundancy(rows, rows)[order])
    q, k = torch.randn(2, 11, 9), torch.randn(2, 11, 9)
    torch.testing.assert_close(
        preserved_scores(q[..., order], k[..., order], 4, 1.0), preserved_scores(q, k, 4, 1.0)[:, order],
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip


def test_a_duplicate_is_redundant_and_a_dead_row_goes_first() -> None:
    rows = torch.eye(6) + 0.01 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    rows[4] = -2 * rows[1]
    scores = redundancy(rows, rows)
    assert set(scores.argsort()[:2].tolist()) == {1, 4}
    rows[2] = 0
    assert int(redundancy(rows, torch.ones(6, 1)).argmin()) == 2, "left alone the formula ranks it last"
    outgoing = torch.ones(6, 3)
    outgoing[5] = 0
    assert set(redundancy(rows, outgoing).argsort()[:2].tolist()) == {2, 5}


def test_dead_units_go_first_and_nothing_changes() -> None:
    model = random_model(SPECS["uniform"]).double()
    images = random_images(model.spec).double()
    with torch.no_grad():
        for b in model.blocks:
            qkv = b.attn.qkv
            for row in (
                0,
                1,
                9,
                10,
                16,
                17,
                25,
                26,
                32,
                33,
                41,
                42,
            ):  # pairs 0, 1 of head 0 and 1, 2 of head 1; values too
                qkv.weight[row] = 0
                qkv.bias[row] = 0
            b.mlp.fc1.weight[3:9] = 0
            b.mlp.fc1.bias[3:9] = 0
    want = model(images)
    small = prune(model, "snp", None, [images], groups=("qk", "v", "mlp"), pruning_ratio=0.25)
    plan = Plan.from_dict(small.plan)
    assert [block.mlp for block in plan.blocks] == [(*range(3), *range(9, 24))] * 2
    assert [block.qk for block in plan.blocks] == [((2, 3, 4, 5, 6, 7), (0, 3, 4, 5, 6, 7))] * 2
    assert [block.v for block in plan.blocks] == [((2, 3, 4, 5, 6, 7), (0, 3, 4, 5, 6, 7))] * 2
    torch.testing.assert_close(small(images), want, rtol=1e-9, atol=1e-9)


def test_channels_are_averaged_over_the_matrices_that_write_them() -> None:
    model = random_model(SPECS["partial_writes_with_layer_scale"])
    group = groups_of(model.spec, ("channel",))[0]
    got = SNP().score(model, [group], None, 0)[group]
    patch = model.patch_embed.proj.weight.detach().flatten(1)
    attn, mlp = model.blocks[0].attn.proj.weight.detach(), model.blocks[0].mlp.fc2.weight.detach()
    last = model.blocks[1].mlp.fc2.weight.detach()

    def unlike(rows: torch.Tensor, i: int) -> float:
        return sum(1 - abs(float(torch.cosine_similarity(rows[i], other, dim=0))) for other in rows)

    assert float(got[5]) == pytest.approx((unlike(patch, 5) + unlike(last, 5)) / 2, rel=1e-4)
    assert float(got[27]) == pytest.approx((unlike(patch, 27) + unlike(attn, 2) + unlike(last, 27)) / 3, rel=1e-4)
    assert float(got[28]) == pytest.approx((unlike(patch, 28) + unlike(mlp, 1) + unlike(last, 28)) / 3, rel=1e-4)


@pytest.mark.parametrize("name", [n for n in shapes.names() if n.startswith("snp_")])
def test_pruning_to_a_published_shape_gives_its_spec_and_the_published_macs(name: str) -> None:
    small = {"img_size": (32, 32), "num_classes": 10}
    dense, target = shapes.get(shapes.dense_of(name), **small), shapes.get(name, **small)
    model = PrunedViT(dense)
    pruned = prune(model, "snp", shape=target, data=[random_images(dense, 1)])
    assert pruned.spec == target
    assert sum(p.numel() for p in pruned.parameters()) == target.params()
    assert shapes.get(name).macs() / 1e9 == pytest.approx(shapes.entry(name)["gmac"], abs=0.0006)


def test_heads_need_another_method() -> None:
    with pytest.raises(PruningError, match="combine it"):
        prune(random_model(SPECS["uniform"]), "snp", {"macs": "70%"}, groups=("head",))


def test_a_vit_small_is_scored_on_64_images_within_a_minute() -> None:
    model = PrunedViT(shapes.get("deit_small")).eval()
    images = [random_images(model.spec, 16, seed=i) for i in range(4)]
    start = time.process_time()
    SNP().score(model, groups_of(model.spec, SNP.groups), images, 0)
    # processor time of all threads: wall time on two cores is at least half of it, on a machine that does nothing else
    assert (time.process_time() - start) / min(2, torch.get_num_threads()) < 60


def test_compact_is_masked_for_its_plan() -> None:
    model = random_model(SPECS["every_head_its_own_width"]).double()
    images = random_images(model.spec).double()
    small = prune(model, "snp", {"macs": "60%"}, [images])
    plan = Plan.from_dict(small.plan)
    torch.testing.assert_close(plan.mask(model)(images), small(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(compact(model, plan)(images), small(images))
