"""Several methods in turn, rounds with recovery between, and what stays equal through all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prunevit
from prunevit.errors import BudgetError, PruningError
from prunevit.pruning import Plan, prune
from prunevit.pruning.cp_vit import CPViT
from prunevit.pruning.magnitude import Magnitude
from prunevit.spec import ViTSpec
from tests.specs import block, random_images, random_model, vit

SPEC = vit(*[block((8,) * 4, (8,) * 4)] * 3)
MODEL = random_model(SPEC)
IMAGES = random_images(SPEC, 8)
DATA = [(IMAGES, torch.arange(8) % 7)]


def test_neurons_then_heads_then_blocks() -> None:
    methods = ["snp:qk,v,mlp", "taylor:head", "magnitude:sublayer"]
    small = prune(MODEL, methods, {"macs": "50%"}, iter(DATA))
    assert small.spec.macs() <= 0.5 * SPEC.macs()
    assert any(block.num_heads < 4 for block in small.spec.blocks)
    assert not all(block.has_attn and block.has_mlp for block in small.spec.blocks)
    plan = Plan.from_dict(small.plan)
    assert plan.dense == SPEC
    torch.testing.assert_close(plan.mask(MODEL)(IMAGES), small(IMAGES), rtol=1e-4, atol=1e-4)
    assert small.provenance["method"] == "+".join(methods)


@pytest.mark.parametrize("call", [prune, prunevit.prune])
def test_of_an_endless_iterator_only_what_is_looked_at_is_read(call: Any) -> None:
    read = 0

    def endless() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal read
        while True:
            read += 1
            yield IMAGES[:4] + read, torch.arange(4)

    small = call(MODEL, ["snp:qk,v,mlp", "taylor:head"], {"macs": "70%"}, endless(), images=16)
    assert read == 4
    seen = [(IMAGES[:4] + n, torch.arange(4)) for n in (1, 2, 3, 4)]
    assert call(MODEL, ["snp:qk,v,mlp", "taylor:head"], {"macs": "70%"}, seen, images=16).plan == small.plan


def test_constraints_for_each_method() -> None:
    small = prune(MODEL, ["magnitude:mlp", "magnitude:v"], [{"macs": "90%"}, {"macs": "85%"}])
    mlp = sum(24 - block.mlp_dim for block in small.spec.blocks)
    only = prune(MODEL, "magnitude:mlp", {"macs": "90%"})
    assert mlp == sum(24 - block.mlp_dim for block in only.spec.blocks)
    assert small.spec.macs() <= 0.85 * SPEC.macs()


def widths(spec: ViTSpec) -> tuple[int, int, int, int]:
    """The fewest heads, pairs, values and neurons of any block."""
    blocks = spec.blocks
    pairs, values = (min(min(dims) for dims in each) for each in zip(*((b.qk_dims, b.v_dims) for b in blocks)))
    return min(b.num_heads for b in blocks), pairs, values, min(b.mlp_dim for b in blocks)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {"rounds": 3}),
        (["magnitude:head", "magnitude", "snp"], {"constraints": [{"macs": m} for m in ("95%", "80%", "75%")]}),
        ("gohsp", {"rounds": 2, "train": DATA, "stages": 1, "groups": ("qk", "v", "mlp")}),
        ("auto", {"scorer": "magnitude", "validation": DATA, "tau": 1.0}),
    ],
)
@pytest.mark.parametrize("pruned_before", [False, True])
def test_ratios_are_of_the_given_model_through_all_stages(
    method: Any, options: dict[str, Any], pruned_before: bool
) -> None:
    given = prune(MODEL, "magnitude", None, groups=("head", "qk"), pruning_ratio=0.25) if pruned_before else MODEL
    least = widths(given.spec)
    small = prune(given, method, data=DATA, max_pruning_ratio=0.5, **{"constraints": {"macs": "75%"}, **options})
    assert small.spec.macs() <= 0.75 * given.spec.macs()
    assert all(2 * now >= before for now, before in zip(widths(small.spec), least)), "no group lost more than a half"
    assert small.provenance["prunings"][-1]["max_pruning_ratio"] == 0.5


def test_a_ratio_is_taken_once_not_in_each_round() -> None:
    small = prune(MODEL, "magnitude", {"macs": "99%"}, rounds=2, pruning_ratio=0.5)
    assert widths(small.spec) == (4, 4, 4, 12)
    bound = {"max_pruning_ratio": 0.5}
    for rounds in (1, 2):
        with pytest.raises(BudgetError, match=r"irreducible floor is .* \(53\.4%"):
            prune(MODEL, "magnitude", {"macs": "40%"}, rounds=rounds, **bound)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (["magnitude:qk", "magnitude:mlp"], {}),
        ("magnitude", {"rounds": 2}),
        ("auto", {"scorer": "magnitude", "validation": DATA, "tau": 1.0}),
    ],
)
def test_what_is_ignored_is_ignored_by_every_stage(method: Any, options: dict[str, Any]) -> None:
    small = prune(MODEL, method, {"macs": "80%"}, DATA, ignored_layers=["blocks.0.mlp"], **options)
    assert small.spec.blocks[0].mlp_dim == 24
    assert small.spec.macs() <= 0.8 * SPEC.macs()


def test_rounds_share_the_way_and_recover_in_between() -> None:
    small = prune(MODEL, "magnitude", {"macs": "60%"}, train=DATA, rounds=3, recovery={"epochs": 2, "lr": 1e-3})
    again = prune(MODEL, "magnitude", {"macs": "60%"}, train=DATA, rounds=3, recovery={"epochs": 2, "lr": 1e-3})
    assert 0.59 <= small.spec.macs() / SPEC.macs() <= 0.6
    assert torch.equal(small(IMAGES), again(IMAGES))
    plan = Plan.from_dict(small.plan)
    torch.testing.assert_close(plan.lift(small)(IMAGES), small(IMAGES), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plan.mask(MODEL)(IMAGES), small(IMAGES), rtol=1e-2), "it was trained"


@pytest.mark.parametrize(
    ("method", "options"),
    [("auto", {"rounds": 2}), (["auto:mlp", "auto:qk"], {}), (["auto:mlp", "magnitude:v", "auto:qk"], {})],
    ids=str,
)
def test_each_of_several_searches_has_a_journal_of_its_own(
    method: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    how: dict[str, Any] = {"scorer": "magnitude", "validation": DATA, "tau": 1.0, **options}
    made = [
        prune(MODEL, method, {"macs": "80%"}, DATA, journal=tmp_path / "j", **how),
        prune(MODEL, method, {"macs": "80%"}, DATA, journal=tmp_path / "j", **how),  # goes on where both were
        prune(MODEL, method, {"macs": "80%"}, DATA, **how),
    ]
    assert made[0].plan == made[1].plan == made[2].plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j", "j.search2"]


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("cp-vit", {"rounds": 2}, "one method that drops tokens, in one round, got 2"),
        (["magnitude", "cp-vit", "evit"], {}, "one method that drops tokens, in one round, got 2"),
        (["magnitude", "cp-vit"], {"pruning_ratio": {"head": 0.5}}, "one pruning_ratio for tokens"),
        (["magnitude", "evit"], {"layers": [3]}, "within the 3 blocks"),
        (["magnitude", "cp-vit"], {"start": 3}, "a start before the last of 3 layers"),
        (["magnitude", "gohsp"], {"groups": ("channel", "mlp")}, "groups that gohsp scores, .* got channel"),
        (["magnitude", "auto"], {}, "expected validation="),
        (["magnitude", "auto"], {"validation": DATA, "mhsa": ("head",), "scorer": "snp"}, "groups that snp scores"),
        (["magnitude", "gohsp"], {"stages": 1, "train": None, "recovery": None}, "expected train="),
    ],
)
def test_what_a_later_stage_cannot_do_is_refused_before_the_first(
    method: Any, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def untouched(*_: object) -> None:
        pytest.fail("something was pruned")

    monkeypatch.setattr(Magnitude, "score", untouched)
    monkeypatch.setattr(CPViT, "_heads", untouched)
    how = {"train": DATA, "recovery": {"epochs": 1}, **options}
    with pytest.raises(PruningError, match=reason):
        prune(MODEL, method, {"macs": "80%"}, DATA, **how)


def test_evit_needs_its_class_token_and_static_images_before_the_first_stage() -> None:
    spec = SPEC.replace(class_token=False, global_pool="avg")
    with pytest.raises(PruningError, match="a class token, whose attention evit ranks by"):
        prune(random_model(spec), ["magnitude", "evit"], [{"macs": "1%"}, {"macs": "1%"}])
    dynamic = random_model(SPEC.replace(dynamic_img_size=True))
    with pytest.raises(PruningError, match="a static image size"):
        prune(dynamic, ["magnitude", "evit"], [{"macs": "1%"}, {"macs": "1%"}])


@pytest.mark.parametrize("how", [{"pruning_ratio": 0.25}, {"shape": vit(*[block((6,) * 4, (8,) * 4)] * 3)}], ids=str)
def test_recovery_goes_with_a_ratio_and_with_a_shape(how: dict[str, Any]) -> None:
    cut = prune(MODEL, "magnitude", **how)
    small = prune(MODEL, "magnitude", train=DATA, recovery={"epochs": 1, "lr": 1e-3}, **how)
    assert small.plan == cut.plan
    assert not torch.equal(small.head.weight, cut.head.weight), "it was trained"


def test_ratios_without_constraints_go_through_a_list_of_methods() -> None:
    small = prune(MODEL, ["magnitude:head", "taylor:mlp"], None, DATA, pruning_ratio={"head": 0.25, "mlp": 0.5})
    assert widths(small.spec) == (3, 8, 8, 12)


@pytest.mark.parametrize(
    ("method", "recipe", "options"),
    [
        ("magnitude", "recovery", {}),
        ("gohsp", "recipe", {"finetune_epochs": 1}),
        ("gohsp", "recipe", {"stages": 1}),
        ("auto", "recipe", {"finetune_epochs": 1, "scorer": "magnitude", "tau": 1.0, "validation": DATA}),
    ],
)
def test_the_seed_of_a_recipe_goes_before_the_methods(method: str, recipe: str, options: dict[str, object]) -> None:
    def trained(of_job: int, **seeds: int) -> torch.Tensor:
        how: Any = options | {recipe: {"lr": 1e-2, "mixup": 0.8, **seeds}}
        return prune(MODEL, method, {"macs": "80%"}, DATA, train=DATA, seed=of_job, **how).head.weight

    assert torch.equal(trained(0, seed=1), trained(1))
    assert not torch.equal(trained(0), trained(1))


def test_options_go_to_the_methods_that_have_them() -> None:
    small = prune(MODEL, ["snp:qk", "gohsp:head"], {"macs": "85%"}, DATA, gamma=2, damping=0.5, min_kept={"qk": 2})
    assert min(min(block.qk_dims) for block in small.spec.blocks) >= 2
    with pytest.raises(PruningError, match="dampling"):
        prune(MODEL, ["snp:qk", "gohsp:head"], {"macs": "85%"}, DATA, dampling=0.5)


@pytest.mark.parametrize(
    ("method", "constraints", "options", "reason"),
    [
        (["snp", "magnitud"], {"macs": "50%"}, {}, "a method out of"),
        ([], {"macs": "50%"}, {}, "at least one method"),
        (["magnitude:heads"], {"macs": "50%"}, {}, "kinds of group"),
        (["magnitude", "random"], [{"macs": "50%"}], {}, "each of 2 methods"),
        ("magnitude", None, {"pruning_ratio": 0.5, "rounds": 2}, "constraints, to share among several rounds"),
        (["magnitude", "random"], None, {"shape": SPEC}, "a shape for one method, in one round"),
        ("magnitude", [{"macs": "70%"}], {"rounds": 2}, "one mapping of constraints, which rounds share, got a list"),
        ("magnitude", {"macs": "50%"}, {"rounds": 0}, "one round"),
        (["snp", "magnitude"], {"macs": "50%"}, {"ignored_layers": ["block.1"]}, "a pattern of addresses .*'block.1'"),
        ("cp-vit", {"macs": "50%"}, {"max_pruning_ratio": {"block.1": 0.5}}, "'block.1'"),
        ("magnitude:mlp", None, {"pruning_ratio": {"head": 0.5}}, "such as .'blocks.0.mlp'.* got 'head'"),
        ("magnitude", {"macs": "50%"}, {"recovery": {}}, "expected train="),
    ],
)
def test_what_does_not_fit_is_named(
    method: object, constraints: object, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(PruningError, match=reason):
        prune(MODEL, method, constraints, DATA, **options)  # type: ignore[arg-type]
