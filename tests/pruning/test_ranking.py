"""Scores in one order: scope, normalisation, bundles, and what is protected."""

from __future__ import annotations

import pytest
import torch

from prunevit.errors import PruningError
from prunevit.pruning.groups import Group, groups_of, matches
from prunevit.pruning.ranking import Ranking
from tests.specs import block, vit

SPEC = vit(block((4, 4), (3, 3), 10), block((4, 4), (3, 3), 10))
GROUPS = {f"{g.layer}/{g.head}": g for g in groups_of(SPEC, ("head", "qk", "v", "mlp", "channel"))}
FIRST, SECOND = GROUPS["blocks.0.mlp/-1"], GROUPS["blocks.1.mlp/-1"]
RISING = torch.arange(1.0, 11)


def units(ranking: Ranking, scores: dict[Group, torch.Tensor]) -> list[tuple[int, tuple[int, ...]]]:
    return [(bundle.group.block, bundle.units) for bundle in ranking.order(scores)[1]]


def test_alone_in_its_group_each_gives_the_same_share() -> None:
    order = units(Ranking(), {FIRST: RISING * 100, SECOND: RISING.flip(0)})
    assert order[:4] == [(1, (9,)), (0, (0,)), (1, (8,)), (0, (1,))]
    assert len(order) == 18, "one of each stays"


def test_global_pruning_compares_layers_after_normalising() -> None:
    scores = {FIRST: RISING * 100, SECOND: torch.full((10,), 7.0)}
    order = units(Ranking(global_pruning=True), scores)
    assert order[:5] == [(0, (i,)) for i in range(5)]
    raw = units(Ranking(global_pruning=True, normalizer=None), scores)
    assert [b for b, _ in raw[:9]] == [1] * 9


@pytest.mark.parametrize("normalizer", ["mean", "sum", "max", "standardization", "gaussian", "lamp", None])
def test_every_normalizer_keeps_the_order_within_a_layer(normalizer: str | None) -> None:
    scores = {FIRST: torch.rand(10, generator=torch.Generator().manual_seed(0)), SECOND: RISING}
    order = units(Ranking(global_pruning=True, normalizer=normalizer), scores)  # type: ignore[arg-type]
    assert [u for b, (u,) in order if b == 1] == list(range(9))
    assert [u for b, (u,) in order if b == 0] == scores[FIRST].argsort()[:9].tolist()


def test_isomorphic_ranks_kinds_apart() -> None:
    pairs = [g for g in GROUPS.values() if g.kind == "qk"]
    scores = {g: torch.rand(4) * 1e-6 for g in pairs} | {FIRST: RISING}
    kinds = [bundle.group.kind for bundle in Ranking(isomorphic=True).order(scores)[1]]
    assert 4 <= kinds[:12].count("qk") <= 8, "the same share of each kind, though pairs score far lower"


def test_bundles_round_what_is_kept() -> None:
    order = units(Ranking(round_to=4), {FIRST: RISING})
    assert order == [(0, (0, 1)), (0, (2, 3, 4, 5))], "10 → 8 → 4, and 0 may not be"
    order = units(Ranking(round_to={"qk": 4}, min_kept={"mlp": 0}), {FIRST: RISING})
    assert len(order) == 10
    assert units(Ranking(round_to=16), {FIRST: RISING}) == []


def test_what_is_protected_stays() -> None:
    assert len(units(Ranking(max_pruning_ratio=0.3), {FIRST: RISING, SECOND: RISING})) == 6
    ranking = Ranking(max_pruning_ratio={"blocks.0.*": 0.5}, ignored_layers=["blocks.1.mlp"])
    assert units(ranking, {FIRST: RISING, SECOND: RISING}) == [(0, (i,)) for i in range(5)]
    pairs = {g: torch.rand(4) for g in GROUPS.values() if g.kind == "qk"}
    assert len(units(Ranking(min_kept=0), pairs)) == 12, "a head without a pair has no meaning"
    sublayers = groups_of(SPEC, ("sublayer",))
    scores = {g: torch.rand(2) for g in sublayers}
    order = Ranking(ignored_layers=["blocks.1.attn"], min_kept=0).order(scores)[1]
    assert [b.group.address(b.units[0]) for b in order].count("blocks.1.attn.sublayer") == 0
    assert len(order) == 3


def test_fixed_ratios_go_at_once() -> None:
    fixed, rest = Ranking(pruning_ratio={"mlp": 0.5, "blocks.1.mlp": 0.2}).order({FIRST: RISING, SECOND: RISING})
    assert {b.group: sum(1 for other in fixed if other.group == b.group) for b in fixed} == {FIRST: 5, SECOND: 2}
    assert {b.units for b in fixed if b.group == FIRST} == {(0,), (1,), (2,), (3,), (4,)}
    assert len(rest) == 4 + 7


def test_a_bound_is_never_overstepped() -> None:
    heads = {group: torch.rand(group.size) for group in groups_of(vit(block((4,) * 3, (4,) * 3)), ("head",))}
    assert len(units(Ranking(max_pruning_ratio=0.5), heads)) == 1, "a second of three would be more than a half"


def test_ratios_count_from_the_group_as_it_was_at_first() -> None:
    at_first = {FIRST: Group("mlp", FIRST.layer, 16, FIRST.block)}
    _, rest = Ranking(max_pruning_ratio=0.5).order({FIRST: RISING, SECOND: RISING}, at_first)
    assert [sum(b.group == group for b in rest) for group in (FIRST, SECOND)] == [2, 5], "16 → 8 and 10 → 5"
    fixed, _ = Ranking(pruning_ratio=0.5).order({FIRST: RISING}, at_first)
    assert [b.units for b in fixed] == [(0,), (1,)]
    assert Ranking(pruning_ratio=0.3).order({FIRST: RISING}, at_first)[0] == [], "that much is gone already"


def test_ratios_of_sublayers_are_of_those_that_a_pattern_names() -> None:
    four = groups_of(vit(block(), block(), block(), block()), ("sublayer",))
    scores = {group: torch.arange(4.0) for group in four}

    def going(**options: object) -> tuple[list[str], list[str]]:
        found = Ranking(min_kept=0, **options).order(scores)  # type: ignore[arg-type]
        fixed, rest = (sorted(b.group.address(u)[7:-9] for b in bundles for u in b.units) for bundles in found)
        return fixed, rest

    assert going(max_pruning_ratio={"*": 0.0, "blocks.3.*": 1.0}) == ([], ["3.attn", "3.mlp"])
    protected = going(max_pruning_ratio={"blocks.0.*": 0.0})[1]
    assert protected == ["1.attn", "1.mlp", "2.attn", "2.mlp", "3.attn", "3.mlp"]
    assert going(max_pruning_ratio={"blocks.*.attn.*": 0.5})[1] == [
        "0.attn",
        "0.mlp",
        "1.attn",
        "1.mlp",
        "2.mlp",
        "3.mlp",
    ]
    assert going(pruning_ratio={"blocks.3.attn": 0.5})[0] == ["3.attn"]
    assert going(pruning_ratio={"blocks.*.mlp.*": 0.5})[0] == ["0.mlp", "1.mlp"]
    assert going(pruning_ratio={"blocks.3": 0.5})[0] == ["3.attn", "3.mlp"], "a half of one, rounded up"
    gone = {four[0]: groups_of(vit(*[block()] * 6), ("sublayer",))[0]}
    assert len(Ranking(max_pruning_ratio=0.5).order(dict.fromkeys(four[:1], torch.rand(4)), gone)[1]) == 1


@pytest.mark.parametrize("options", [{}, {"max_pruning_ratio": 0.5}, {"min_kept": 2}], ids=str)
def test_a_ratio_takes_the_sublayer_that_it_names_though_it_ranks_highest(options: dict[str, object]) -> None:
    """And where fewer may go than ratios name, the lowest of those that they name."""
    attn = groups_of(vit(block(), block(), block(), block()), ("sublayer",))[0]

    def dropped(*named: int) -> list[tuple[int, ...]]:
        ratios = {f"blocks.{i}.attn.sublayer": 1.0 for i in named}
        fixed, _ = Ranking(pruning_ratio=ratios, **options).order({attn: torch.arange(4.0)})  # type: ignore[arg-type]
        return [bundle.units for bundle in fixed]

    assert dropped(3) == [(3,)]
    most = 2 if options else 3
    assert dropped(1, 2, 3) == [(1,), (2,), (3,)][:most]


def test_patterns_match_as_globs_parts_and_kinds() -> None:
    found = [p for p in ("blocks.3.*", "blocks.3.attn", "qk", "blocks.*.qk", "blocks.3.mlp", "blocks.3") if
             matches("blocks.3.attn.qk", p)]  # fmt: skip
    assert found == ["blocks.3.*", "blocks.3.attn", "qk", "blocks.*.qk", "blocks.3"]
    assert not matches("blocks.30.attn.qk", "blocks.3")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups": ("heads",)}, "kinds of group"),
        ({"groups": ()}, "groups out of head, .* got none"),
        ({"normalizer": "softmax"}, "normalizer"),
        ({"global_pruning": True, "isomorphic": True}, "one of"),
        ({"pruning_ratio": 1.5}, "pruning_ratio"),
        ({"max_pruning_ratio": {"qk": -1}}, "max_pruning_ratio"),
        ({"round_to": 0}, "round_to"),
        ({"min_kept": {"heads": 1}}, "min_kept"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], reason: str) -> None:
    with pytest.raises(PruningError, match=reason):
        Ranking(**options).order({FIRST: RISING})  # type: ignore[arg-type]


def test_a_score_that_is_no_number_is_refused() -> None:
    for wrong in (torch.nan, torch.inf):
        with pytest.raises(PruningError, match=r"blocks\.0\.mlp"):
            Ranking().order({FIRST: RISING * wrong})


@pytest.mark.parametrize("normalizer", ["mean", "sum", "max", "standardization", "gaussian", "lamp", None])
def test_units_worth_nothing_go_first_and_raise_no_others(normalizer: str | None) -> None:
    """A live unit is worth the same beside whatever is dead."""
    live = {Group("mlp", FIRST.layer, 10, 0): RISING + 0.5, SECOND: RISING}
    dead = {Group("mlp", FIRST.layer, 20, 0): torch.cat([torch.full((10,), -torch.inf), RISING + 0.5]), SECOND: RISING}
    ranking = Ranking(global_pruning=True, normalizer=normalizer)  # type: ignore[arg-type]
    order = [b for b, _ in units(ranking, dead)]
    assert order == [0] * 10 + [b for b, _ in units(ranking, live)]
