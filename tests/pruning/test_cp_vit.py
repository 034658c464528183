"""CP-ViT and EViT: tokens really go, at the counts and in the layers that the schedule says."""

from __future__ import annotations

import pytest
import torch

from prunevit import shapes
from prunevit.errors import BudgetError, PruningError
from prunevit.models import PrunedViT
from prunevit.pruning import Plan, compact, groups_of, prune
from prunevit.pruning.budget import Budget
from prunevit.pruning.cp_vit import CPViT, EViT
from prunevit.pruning.method import Job
from tests.specs import SPECS, block, random_images, random_model, vit

SPEC = vit(*[block((8,) * 4, (8,) * 4)] * 4, img_size=(24, 32))  # 48 patches


@pytest.mark.parametrize("method", ["cp-vit", "evit"])
@pytest.mark.parametrize("share", [90, 75, 60])
def test_budgets_are_met_closely(method: str, share: int) -> None:
    small = prune(random_model(SPEC), method, {"macs": f"{share}%"}, [random_images(SPEC)])
    got = small.spec.macs() / SPEC.macs()
    one_token = 1 / 48
    assert share / 100 - max(0.01, one_token) <= got <= share / 100
    assert small.spec.tokens()[-1][2] < 49


@pytest.mark.parametrize("method", ["cp-vit", "evit"])
def test_masked_is_compact(method: str) -> None:
    model, images = random_model(SPEC).double(), random_images(SPEC).double()
    small = prune(model, method, {"macs": "70%"}, [images])
    plan = Plan.from_dict(small.plan)
    torch.testing.assert_close(plan.mask(model)(images), small(images), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(plan.lift(small)(images), small(images), rtol=1e-9, atol=1e-9)


def test_the_cascade_deepens_linearly_and_what_is_dropped_stays_dropped() -> None:
    small = prune(random_model(SPEC), "cp-vit", None, [random_images(SPEC)], pruning_ratio=0.75)
    assert [block.select and block.select.keep for block in small.spec.blocks] == [None, 36, 24, 12]
    assert [block.num_heads for block in small.spec.blocks] == [4, 3, 2, 1]
    assert all(
        s.cascade and s.rule == "max_attention" and s.before == "attn" for b in small.spec.blocks if (s := b.select)
    )
    tokens = prune(random_model(SPEC), "cp-vit", None, pruning_ratio=0.75, heads=False, start=3)
    assert [block.select and block.select.keep for block in tokens.spec.blocks] == [None, None, None, 12]
    assert [block.num_heads for block in tokens.spec.blocks] == [4] * 4


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"ignored_layers": ["blocks.3.*"]}, [4, 3, 2, 4]),
        ({"min_kept": 2}, [4, 3, 2, 2]),
        ({"min_kept": {"head": 3}}, [4, 3, 3, 3]),
        ({"max_pruning_ratio": 0.5}, [4, 3, 2, 2]),
        ({"round_to": 2}, [4, 4, 2, 2]),
        ({"groups": ("head",)}, [4, 3, 2, 1]),
    ],
    ids=str,
)
def test_options_of_the_ranking_are_about_heads(options: dict[str, object], heads: list[int]) -> None:
    small = prune(random_model(SPEC), "cp-vit", None, [random_images(SPEC)], pruning_ratio=0.75, **options)
    assert [block.num_heads for block in small.spec.blocks] == heads
    assert [block.select and block.select.keep for block in small.spec.blocks] == [None, 36, 24, 12]


def test_tokens_are_chosen_by_the_score_of_the_paper() -> None:
    """Transcribed for one image: Σ over layers and heads of the most attention that any query pays a token."""
    model, images = random_model(SPEC).double(), random_images(SPEC, 1).double()
    small = prune(model, CPViT(heads=False), None, pruning_ratio=0.75)
    x, informative, alive = model._embed(images), torch.zeros(49).double(), list(range(49))
    for keep, module in zip([48, 36, 24, 12], model.blocks):
        if keep < len(alive) - 1:
            patches = sorted(sorted(range(1, len(alive)), key=lambda t: -float(informative.detach()[t]))[:keep])
            informative, x, alive = informative[[0, *patches]], x[:, [0, *patches]], [0, *patches]
        q, k, _ = module.attn.qkv(module.norm1(x))[0].split(32, dim=-1)
        for h in range(4):
            scores = q[:, 8 * h : 8 * h + 8] @ k[:, 8 * h : 8 * h + 8].T * module.attn.scale
            informative = informative + torch.stack([scores.softmax(-1)[:, t].max() for t in range(len(alive))])
        x = module(x)
    torch.testing.assert_close(small(images), model.forward_head(model.norm(x)), rtol=1e-9, atol=1e-9)


def test_heads_are_scored_by_the_most_attention_they_pay() -> None:
    model = random_model(SPEC).double()
    images = random_images(SPEC, 2).double()
    job = Job(model, Budget.of(SPEC, {"macs": "70%"}), [images])
    scores = CPViT()._heads(job)
    group = groups_of(SPEC, ("head",))[0]
    q, k, _ = model.blocks[0].attn.qkv(model.blocks[0].norm1(model._embed(images))).split(32, dim=-1)
    for h in range(4):
        maps = (q[..., 8 * h : 8 * h + 8] @ k[..., 8 * h : 8 * h + 8].mT * 0.25).softmax(-1)
        want = sum(float(maps[b, :, t].detach().max()) for b in range(2) for t in range(49))
        assert float(scores[group][h]) == pytest.approx(want)


def test_evit_fuses_what_it_drops_at_three_layers() -> None:
    spec = vit(*[block()] * 12)  # 12 patches
    small = prune(random_model(spec), "evit", None, pruning_ratio=0.5)
    chosen = {i: block.select for i, block in enumerate(small.spec.blocks) if block.select}
    assert {i: select.keep for i, select in chosen.items()} == {3: 6, 6: 4, 9: 3}
    assert all(s.fuse and s.rule == "class_attention" and s.before == "mlp" for s in chosen.values())
    plain = prune(random_model(spec), EViT(layers=[0], fuse=False), None, pruning_ratio=0.5)
    assert plain.spec.tokens()[-1] == (7, 7, 7)


def test_half_of_the_tokens_saves_two_fifths_of_deit() -> None:
    """Published for CP-ViT: 50 % of the patches pruned saves more than 40 % of the FLOPs."""
    spec = shapes.get("deit_tiny")
    job = Job(PrunedViT(spec, device="meta"), Budget.of(spec, {"macs": "60%"}))
    plan_of = CPViT(heads=False).planner(job)
    saved = 1 - plan_of(0.9).spec().macs() / spec.macs()
    tokens = [mlp for _, _, mlp in plan_of(0.9).spec().tokens()]
    assert saved > 0.35
    assert 0.55 < sum(tokens) / (12 * 197) < 0.7


def test_a_combination_with_neurons() -> None:
    model, images = random_model(SPEC), random_images(SPEC)
    small = prune(model, ["cp-vit", "magnitude"], {"macs": "50%"}, [images])
    assert small.spec.macs() <= 0.5 * SPEC.macs()
    plan = Plan.from_dict(small.plan)
    assert plan.dense == SPEC
    torch.testing.assert_close(compact(model, plan)(images), small(images), rtol=1e-4, atol=1e-4)
    other = prune(model, ["magnitude", "cp-vit"], {"macs": "50%"}, [images])
    assert other.spec.tokens()[-1][2] < 49


def test_a_ratio_of_heads_counts_those_that_are_gone() -> None:
    model, images = random_model(SPEC), [random_images(SPEC)]
    small = prune(model, ["magnitude:head", "cp-vit"], {"macs": "95%"}, images, pruning_ratio=0.5)
    assert [block.num_heads for block in small.spec.blocks] == [2, 2, 2, 2]
    more = prune(model, ["magnitude:head", "cp-vit"], None, images, pruning_ratio=0.75, ignored_layers=["blocks.3.*"])
    assert [block.num_heads for block in more.spec.blocks] == [1, 1, 1, 4]


def test_what_cannot_be_done_is_refused() -> None:
    model, images = random_model(SPEC), [random_images(SPEC)]
    with pytest.raises(BudgetError, match="irreducible floor"):
        prune(model, "cp-vit", {"macs": "5%"}, images)
    with pytest.raises(PruningError, match="select tokens yet"):
        prune(prune(model, "evit", {"macs": "80%"}), "cp-vit", {"macs": "80%"}, images)
    with pytest.raises(PruningError, match="class token"):
        prune(random_model(SPECS["average_pool_fc_norm"]), "evit", {"macs": "80%"})
    with pytest.raises(PruningError, match="within the 4 blocks"):
        prune(model, "evit", {"macs": "80%"}, layers=[4])
    with pytest.raises(PruningError, match="meets the budget"):
        prune(model, "evit", {"macs": "20%"}, pruning_ratio=0.1)
