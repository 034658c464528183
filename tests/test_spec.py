"""The spec: every bound and every contradiction is refused by the name of its field; its JSON schema is current."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from prunevit import shapes
from prunevit.errors import SpecError
from prunevit.nn import RaggedAttention
from prunevit.schema import schema
from prunevit.spec import FORMAT_VERSION, MAX_HEAD_DIM, MAX_PARAMS, AttnPoolSpec, BlockSpec, TokenSelect, ViTSpec
from prunevit_kernels import MAX_HEAD_DIM as WIDEST_THAT_RUNS
from tests.specs import SPECS

SCHEMA = Path(__file__).parent.parent / "docs" / "vit-spec.schema.json"


def small() -> dict[str, Any]:
    """A valid spec as JSON has it, with something of everything."""
    block = {"qk_dims": [3, 2], "v_dims": [4, 1], "attn_scale": 0.25, "mlp_dim": 6, "attn_reads": [0, 2]}
    select = {"before": "mlp", "rule": "class_attention", "keep": 2, "fuse": True}
    return {
        "embed_dim": 6,
        "img_size": [8, 8],
        "patch_size": [4, 4],
        "blocks": [copy.deepcopy(block), {**copy.deepcopy(block), "select": select}],
    }


def changed(path: str, value: Any) -> dict[str, Any]:
    data = small()
    *parents, last = path.split(".")
    at: Any = data
    for part in parents:
        at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
    at[last] = value
    return data


REFUSED: dict[str, tuple[str, Any, str]] = {
    "later_version": ("format_version", 2, r"format_version: written by a later prunevit \(format 2\).*upgrade"),
    "no_version": ("format_version", 0, "format_version"),
    "version_as_text": ("format_version", "1", "format_version"),
    "unknown_field": ("heads", 3, "heads: Extra inputs"),
    "unknown_block_field": ("blocks.0.heads", 3, r"blocks\.0\.heads: Extra inputs"),
    "width_of_nothing": ("embed_dim", 0, "embed_dim.*got 0"),
    "width_negative": ("embed_dim", -4, "embed_dim"),
    "width_absurd": ("embed_dim", 10**9, "embed_dim"),
    "width_beyond_int64": ("embed_dim", 10**30, "embed_dim"),
    "width_true": ("embed_dim", True, "embed_dim"),
    "width_text": ("embed_dim", "6", "embed_dim"),
    "width_fraction": ("embed_dim", 6.5, "embed_dim"),
    "width_none": ("embed_dim", None, "embed_dim"),
    "image_one_number": ("img_size", 8, "img_size"),
    "image_three_numbers": ("img_size", [3, 8, 8], "img_size"),
    "image_absurd": ("img_size", [8, 2**20], r"img_size\.1"),
    "patch_larger_than_image": ("patch_size", [4, 9], "patch_size: expected a patch within the image's width 8, got 9"),
    "channels_absurd": ("in_chans", 2**20, "in_chans"),
    "classes_negative": ("num_classes", -1, "num_classes"),
    "classes_absurd": ("num_classes", 2**40, "num_classes"),
    "registers_absurd": ("reg_tokens", 2**20, "reg_tokens"),
    "blocks_not_a_list": ("blocks", {}, "blocks"),
    "block_not_an_object": ("blocks", [3], r"blocks\.0"),
    "depth_absurd": ("blocks", [small()["blocks"][0]] * 1025, "blocks.*1024"),
    "too_many_parameters": (
        "",
        {"embed_dim": 2**16, "blocks": [{**small()["blocks"][0], "mlp_dim": 2**18}]},
        f"expected at most {MAX_PARAMS:,} parameters",
    ),
    "head_width_zero": ("blocks.0.qk_dims", [3, 0], r"blocks\.0\.qk_dims\.1"),
    "head_width_absurd": ("blocks.0.v_dims", [4, 2048], r"blocks\.0\.v_dims\.1"),
    "head_wider_than_kernels": ("blocks.0.qk_dims", [3, 129], r"blocks\.0\.qk_dims\.1: .* 128, got 129"),
    "heads_absurd": ("blocks.0.qk_dims", [1] * 257, r"blocks\.0\.qk_dims.*256"),
    "heads_uneven": ("blocks.0.v_dims", [4], r"blocks\.0: v_dims: expected one width for each of 2 heads, got 1"),
    "scale_zero": ("blocks.0.attn_scale", 0, r"blocks\.0\.attn_scale"),
    "scale_negative": ("blocks.0.attn_scale", -0.1, r"blocks\.0\.attn_scale"),
    "scale_infinite": ("blocks.0.attn_scale", float("inf"), r"blocks\.0\.attn_scale"),
    "scale_nan": ("blocks.0.attn_scale", float("nan"), r"blocks\.0\.attn_scale"),
    "mlp_negative": ("blocks.0.mlp_dim", -1, r"blocks\.0\.mlp_dim"),
    "mlp_absurd": ("blocks.0.mlp_dim", 2**40, r"blocks\.0\.mlp_dim"),
    "removed_attention_with_heads": (
        "blocks.0.has_attn",
        False,
        r"blocks\.0: has_attn: a removed attention has no heads",
    ),
    "removed_mlp_with_neurons": ("blocks.0.has_mlp", False, r"blocks\.0: has_mlp: a removed MLP has no neurons"),
    "reads_nothing": ("blocks.0.attn_reads", [], r"blocks\.0\.attn_reads"),
    "reads_twice": ("blocks.0.attn_reads", [1, 1], r"blocks\.0: attn_reads: expected ascending distinct"),
    "writes_backwards": ("blocks.0.attn_writes", [2, 1], r"blocks\.0: attn_writes: expected ascending distinct"),
    "mlp_reads_backwards": ("blocks.0.mlp_reads", [2, 1], r"blocks\.0: mlp_reads: expected ascending distinct"),
    "mlp_writes_beyond": (
        "blocks.0.mlp_writes",
        [0, 6],
        r"blocks\.0\.mlp_writes: expected channels below embed_dim 6, got 6",
    ),
    "reads_negative": ("blocks.0.mlp_reads", [-1], r"blocks\.0\.mlp_reads"),
    "eps_zero": ("norm_eps", 0, "norm_eps"),
    "act_unknown": ("act", "swish", "act"),
    "pool_unknown": ("global_pool", "prr", "global_pool"),
    "positions_unknown": ("pos_embed", "rope", "pos_embed"),
    "token_pool_without_class_token": ("class_token", False, "global_pool: token pooling needs a class token"),
    "distilled_with_registers": ("", {"distilled": True, "reg_tokens": 1}, "distilled: expected a class token"),
    "distilled_with_average": ("", {"distilled": True, "global_pool": "avg"}, "distilled: expected a class token"),
    "distilled_with_fc_norm": ("", {"distilled": True, "fc_norm": True}, "fc_norm: expected none in a distilled"),
    "map_without_pool": ("global_pool", "map", "attn_pool: expected one .* none otherwise, got none with 'map'"),
    "pool_without_map": ("attn_pool", {"num_heads": 2, "mlp_dim": 4}, "none otherwise, got one with 'token'"),
    "pool_heads_uneven": (
        "",
        {"global_pool": "map", "attn_pool": {"num_heads": 4, "mlp_dim": 4}},
        r"attn_pool\.num_heads: expected a divisor of embed_dim 6, got 4",
    ),
    "select_unknown_rule": ("blocks.1.select.rule", "random", r"blocks\.1\.select\.rule"),
    "select_unknown_place": ("blocks.1.select.before", "norm", r"blocks\.1\.select\.before"),
    "select_nothing": ("blocks.1.select.keep", 0, r"blocks\.1\.select\.keep"),
    "select_more_than_there_are": ("blocks.1.select.keep", 5, r"blocks\.1\.select\.keep: expected at most the 4 patch"),
    "select_before_any_attention": (
        "blocks.0.select",
        {"before": "attn", "rule": "class_attention", "keep": 2, "fuse": True},
        r"blocks\.0\.select: expected an attention with heads before it",
    ),
    "select_by_two_rules": (
        "blocks.0.select",
        {"before": "mlp", "rule": "max_attention", "keep": 3},
        "blocks.select: expected one rule",
    ),
    "select_by_a_class_token_that_is_not": (
        "",
        {"class_token": False, "global_pool": "avg"},
        r"blocks\.1\.select\.rule: class_attention needs a class token",
    ),
    "dynamic_image_of_broken_patches": (
        "",
        {"dynamic_img_size": True, "img_size": [8, 9]},
        "img_size: expected a width of whole patches of 4 .*, got 9",
    ),
    "select_in_a_dynamic_image": ("dynamic_img_size", True, r"blocks\.1\.select: a static token count needs"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_field(case: str) -> None:
    path, value, message = REFUSED[case]
    data = changed(path, value) if path else small() | value
    with pytest.raises(SpecError, match=message):
        ViTSpec.from_dict(data)


def test_heads_are_as_wide_as_kernels_take_them() -> None:
    """A wider one would be refused by the first call, long after it was read."""
    assert MAX_HEAD_DIM == WIDEST_THAT_RUNS
    assert ViTSpec.from_dict(changed("blocks.0.qk_dims", [WIDEST_THAT_RUNS, 2])).blocks[0].qk_dims[0] == 128


def test_the_small_spec_is_valid() -> None:
    """Else the cases above would be refused for another reason."""
    assert ViTSpec.from_dict(small()).to_dict()["format_version"] == FORMAT_VERSION


@pytest.mark.parametrize("data", [[], "spec", 3, None, {1: 2}, {"embed_dim": {1, 2}}])
def test_not_a_spec_at_all(data: Any) -> None:
    with pytest.raises(SpecError):
        ViTSpec.from_dict(data)


def test_nested_too_deep() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"blocks": deep}
    with pytest.raises(SpecError):
        ViTSpec.from_dict(deep)


def test_at_most_five_reasons_and_short_values() -> None:
    with pytest.raises(SpecError) as caught:
        ViTSpec.from_dict(small() | {f"field_{i}": "x" * 10_000 for i in range(50)})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", SPECS)
def test_round_trip(name: str) -> None:
    spec = SPECS[name]
    text = json.dumps(spec.to_dict(), allow_nan=False)
    assert ViTSpec.from_dict(json.loads(text)) == spec
    assert hash(ViTSpec.from_dict(json.loads(text))) == hash(spec)


@pytest.mark.parametrize("name", shapes.names() + shapes.names(dense=True))
def test_named_shapes_round_trip(name: str) -> None:
    spec = shapes.get(name)
    assert ViTSpec.from_dict(spec.to_dict()) == spec
    assert spec.macs() > sum(cost.macs for cost in spec.per_block()) > 0
    if "dense" in shapes.entry(name):
        assert spec.macs() < 1.1 * shapes.get(shapes.dense_of(name)).macs()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTSpec(embed_dim=-1, blocks=()), "invalid spec: embed_dim: .*got -1"),
        (lambda: BlockSpec(qk_dims=(8,), v_dims=(), attn_scale=1.0, mlp_dim=4), "v_dims: expected one width"),
        (lambda: TokenSelect(before="x", rule="max_attention", keep=3), "before: .*got 'x'"),  # type: ignore[arg-type]
        (lambda: AttnPoolSpec(num_heads=0, mlp_dim=1), "num_heads: .*got 0"),
        (lambda: RaggedAttention(32, (200,), (8,)), r"qk_dims\.0: .*got 200"),
        (lambda: shapes.get("nope"), "no shape 'nope'; there are .*snp_deit_tiny"),
    ],
)
def test_what_python_asks_for_is_refused_by_name(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_frozen() -> None:
    spec = SPECS["uniform"]
    with pytest.raises(ValidationError):
        spec.embed_dim = 3
    with pytest.raises(ValidationError):
        spec.blocks[0].mlp_dim = 3


def test_replace_checks_anew() -> None:
    spec = SPECS["uniform"]
    assert spec.replace(num_classes=3).num_classes == 3
    assert spec.num_classes == 7
    with pytest.raises(SpecError, match="patch_size"):
        spec.replace(patch_size=(64, 64))


def test_tokens_of_each_block() -> None:
    """One class token and 12 patches; a selection before the MLP spares the MLP, one before attention both."""
    assert SPECS["select_before_mlp"].tokens() == [(13, 13, 13), (13, 13, 6), (6, 6, 6)]
    assert SPECS["select_before_attn"].tokens() == [(13, 13, 13), (13, 6, 6), (6, 6, 6)]
    assert SPECS["evit"].tokens()[:2] == [(13, 13, 9), (9, 9, 6)], "the fused token is one more"


@pytest.mark.parametrize("name", SPECS)
def test_costs_by_block_sum_to_the_whole(name: str) -> None:
    """Every multiply-accumulate of a block by hand, from tokens and widths."""
    spec = SPECS[name]
    costs = spec.per_block()
    assert len(costs) == spec.depth
    for cost, block, (_, n_attn, n_mlp) in zip(costs, spec.blocks, spec.tokens()):
        read, write = (len(c or range(spec.embed_dim)) for c in (block.attn_reads, block.attn_writes))
        by_head = sum(
            n_attn * read * (2 * dqk + dv) + n_attn * n_attn * (dqk + dv) + n_attn * dv * write
            for dqk, dv in zip(block.qk_dims, block.v_dims)
        )
        mlp = n_mlp * block.mlp_dim * sum(len(c or range(spec.embed_dim)) for c in (block.mlp_reads, block.mlp_writes))
        assert cost.macs == cost.qkv_macs + cost.attn_macs + cost.proj_macs + cost.mlp_macs == by_head + mlp
    outside = spec.replace(blocks=())
    if not any(block.select for block in spec.blocks):
        assert spec.macs() == outside.macs() + sum(cost.macs for cost in costs)
    assert spec.params() == outside.params() + sum(cost.params for cost in costs)


def test_deit_small_is_as_large_as_published() -> None:
    """22.05 M parameters and 4.6 G multiply-accumulates (Touvron et al., table 5)."""
    spec = shapes.get("deit_small")
    assert (spec.params(), round(spec.macs() / 1e9, 1)) == (22_050_664, 4.6)


def test_a_shape_has_one_width_or_a_list_a_head() -> None:
    entry = {"embed_dim": 8, "head_dim_dense": 4, "heads": [2, 1], "qk": [3, [5]], "v": [[1, 2], 4], "mlp": [6, 0]}
    spec = ViTSpec.from_shape(entry, num_classes=3)
    assert [(b.qk_dims, b.v_dims, b.mlp_dim) for b in spec.blocks] == [((3, 3), (1, 2), 6), ((5,), (4,), 0)]
    assert {b.attn_scale for b in spec.blocks} == {0.5}
    with pytest.raises(SpecError, match="one width for each of 2 heads"):
        ViTSpec.from_shape(entry | {"v": [[1, 2, 3], 4]})


def test_the_schema_is_current() -> None:
    """``python -m prunevit.schema > docs/vit-spec.schema.json`` writes it."""
    assert json.loads(SCHEMA.read_text("utf-8")) == schema()


@pytest.mark.parametrize("name", SPECS)
def test_specs_fit_the_schema(name: str) -> None:
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8"))).validate(SPECS[name].to_dict())


def test_the_schema_refuses_what_it_can() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))
    validator.check_schema(validator.schema)
    assert validator.is_valid(small())
    for case in ("unknown_field", "width_of_nothing", "width_absurd", "act_unknown", "scale_zero", "heads_absurd"):
        path, value, _ = REFUSED[case]
        assert not validator.is_valid(changed(path, value)), case


def test_emptied_and_removed_differ() -> None:
    empty = {"qk_dims": (), "v_dims": (), "attn_scale": 1.0, "mlp_dim": 0}
    emptied, removed = BlockSpec(**empty), BlockSpec(**empty, has_attn=False, has_mlp=False)
    width = 10
    specs = [ViTSpec(embed_dim=width, blocks=(block,), layer_scale=True) for block in (emptied, removed)]
    assert [spec.per_block()[0].params for spec in specs] == [4 * width, 0], "two biases and two layer scales"
