"""Plans: masked dense = compact = lifted, for every kind of group on every awkward spec; and what a plan refuses."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch

from prunevit.errors import PruningError
from prunevit.models import PrunedViT
from prunevit.pruning.groups import KINDS, Group, Kind, Remainder, groups_of
from prunevit.pruning.plan import Plan
from prunevit.pruning.prune import prune
from prunevit.pruning.surgery import compact
from prunevit.spec import ViTSpec
from tests.specs import SPECS, block, random_images, random_model, select, vit

PRUNABLE = {name: spec for name, spec in SPECS.items() if spec.blocks}


def random_drop(spec: ViTSpec, kinds: tuple[Kind, ...], seed: int = 0, share: float = 0.4) -> dict[Group, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    dropped = {}
    for group in groups_of(spec, kinds):
        count = min(max(1, round(group.size * share)), group.size - 1)
        dropped[group] = sorted(torch.randperm(group.size, generator=generator)[:count].tolist())
    return dropped


def random_plan(spec: ViTSpec, kinds: tuple[Kind, ...], seed: int = 0) -> Plan:
    kinds = tuple(k for k in kinds if k != "channel" or spec.attn_pool is None)
    left = Remainder(spec)
    dropped = random_drop(spec, kinds, seed)
    return Plan.without(spec, {g: [u for u in units if left.take(g, (u,))] for g, units in dropped.items()})


def outputs(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(images.double())


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.detach().abs().max()))


@pytest.mark.parametrize(
    ("name", "kinds"),
    [pytest.param(name, KINDS, id=f"{name}.all") for name in PRUNABLE]
    + [
        pytest.param(name, (kind,), id=f"{name}.{kind}")
        for name in ("every_head_its_own_width", "partial_writes_with_layer_scale", "cp_vit_cascade")
        for kind in KINDS
    ],
)
def test_masked_dense_is_compact_is_lifted(name: str, kinds: tuple[Kind, ...]) -> None:
    spec = PRUNABLE[name]
    model, images = random_model(spec).double(), random_images(spec)
    plan = random_plan(spec, kinds)
    small = compact(model, plan)
    want = outputs(small, images)
    for large in (outputs(plan.mask(model), images), outputs(plan.lift(small), images)):
        same(large if spec.num_classes else large[..., list(plan.channels)], want)
    assert sum(p.numel() for p in small.parameters()) == small.spec.params(), "zeros are not pruned"


def test_lift_carries_weights_trained_after_surgery() -> None:
    spec = SPECS["layer_scale"]
    model, images = random_model(spec).double(), random_images(spec)
    plan = random_plan(spec, KINDS)
    small = compact(model, plan)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(torch.randn_like(parameter))
    same(outputs(plan.lift(small), images), outputs(small, images))
    dense = plan.lift(small).get_parameter("patch_embed.proj.weight")
    assert dense.shape[0] == spec.embed_dim


@pytest.mark.parametrize("rule", ["max_attention", "class_attention"])
@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("before", ["attn", "mlp"])
def test_masked_tokens_are_dropped_tokens(before: str, fuse: bool, cascade: bool, rule: str) -> None:
    spec = vit(block(), block(), block(), block(), global_pool="avg", reg_tokens=1)
    model, images = random_model(spec).double(), random_images(spec)
    selects = [
        None,
        select(before, 8, rule=rule, cascade=cascade, fuse=fuse),
        None,
        select(before, 3, rule=rule, cascade=cascade, fuse=fuse),
    ]
    plan = random_plan(spec, ("head", "qk", "v", "mlp", "channel")).with_selection(selects)
    small = compact(model, plan)
    assert small.spec.tokens()[-1][2] == 2 + 3 + fuse
    same(outputs(plan.mask(model), images), outputs(small, images))
    same(outputs(plan.lift(small), images), outputs(small, images))


def test_emptied_keeps_its_bias_and_removed_adds_nothing() -> None:
    spec = vit(block(), block(), layer_scale=True)
    model, images = random_model(spec).double(), random_images(spec)
    heads, mlp = groups_of(spec, ("head",))[1], groups_of(spec, ("mlp",))[1]
    emptied = Plan.without(spec, {heads: range(2), mlp: range(24)})
    assert emptied.spec().blocks[1].has_attn
    assert emptied.spec().blocks[1].qk_dims == ()
    attn, ffn = groups_of(spec, ("sublayer",))
    removed = Plan.without(spec, {attn: [1], ffn: [1]})
    assert not removed.spec().blocks[1].has_attn
    last = model.blocks[1]
    tokens = outputs(compact(model, removed).blocks[0], x := torch.randn(2, 5, 29).double())
    bias = last.ls1(last.attn.proj.bias) + last.ls2(last.mlp.fc2.bias)
    same(outputs(compact(model, emptied).blocks, x), tokens + bias)
    for plan in (emptied, removed):
        same(outputs(plan.mask(model), images), outputs(compact(model, plan), images))


def test_what_is_left_lies_where_the_model_lay() -> None:
    """Lists of channels too, which are no part of its state."""
    model = random_model(SPECS["partial_reads_and_writes"]).to("meta")
    small = compact(model, Plan.keep_all(model.spec))
    assert list(small.buffers())
    assert {tensor.device.type for tensor in (*small.parameters(), *small.buffers())} == {"meta"}


def test_nothing_dropped_changes_nothing() -> None:
    spec = SPECS["every_head_its_own_width"]
    model, images = random_model(spec), random_images(spec)
    small = compact(model, Plan.keep_all(spec))
    assert small.spec == spec
    assert torch.equal(small(images), model(images))


def test_softmax_scale_stays_the_dense_heads() -> None:
    """Dropping pairs that are zero changes no logit; with a scale of Dqk^-0.5 it would be another model."""
    spec = vit(block(), block())
    model, images = random_model(spec).double(), random_images(spec)
    groups = groups_of(spec, ("qk",))
    with torch.no_grad():
        for b in model.blocks:
            qkv = b.attn.qkv
            for row in (*range(4), *range(8, 12), *range(16, 20), *range(24, 28)):
                qkv.weight[row] = 0
                qkv.bias[row] = 0
    small = compact(model, Plan.without(spec, {group: range(4) for group in groups}))
    assert small.spec.blocks[0].qk_dims == (4, 4)
    same(outputs(small, images), outputs(model, images))
    assert small.blocks[0].attn.qkv.bias.shape == (2 * 8 + 16,), "the bias travels with its rows"


def test_norm_gain_holds_the_scale_of_what_norms_give() -> None:
    spec = vit(block(), embed_dim=64)
    model = random_model(spec)
    with torch.no_grad():
        model.norm.weight.fill_(1)
        model.norm.bias.zero_()
    channel = groups_of(spec, ("channel",))[0]
    x = torch.randn(4, 5, 64)
    x[..., 32:] *= 1e-3
    want = model.norm(x)[..., :32]
    with_gain = compact(model, Plan.without(spec, {channel: range(32, 64)})).norm(x[..., :32])
    without = compact(model, Plan.without(spec, {channel: range(32, 64)}, rescale_norms=False)).norm(x[..., :32])
    assert (with_gain - want).norm() < 0.15 * want.norm() < (without - want).norm()


def test_plans_compose_to_the_first_dense_indices() -> None:
    spec = vit(block((8, 8, 8), (8, 8, 8)), block())
    model, images = random_model(spec).double(), random_images(spec)
    first = random_plan(spec, ("head", "qk", "mlp", "channel", "read"))
    once = compact(model, first)
    second = random_plan(once.spec, ("v", "qk", "mlp", "channel", "read"), seed=1)
    twice = compact(once, second)
    both = Plan.from_dict(twice.plan)
    assert both.dense == spec
    same(outputs(compact(model, both), images), outputs(twice, images))
    same(outputs(both.mask(model), images), outputs(twice, images))
    with pytest.raises(PruningError, match="second plan"):
        second.then(first)


def test_a_timm_model_is_converted_and_left_as_it_is() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5).eval()
    before = copy.deepcopy(model.state_dict())
    plan = random_plan(ViTSpec.from_timm(model), KINDS)
    small = compact(model, plan)
    assert isinstance(small, PrunedViT)
    images = torch.randn(2, 3, 32, 32) + 3
    torch.testing.assert_close(plan.mask(model)(images), small(images), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_reset_classifier_keeps_the_plan_usable() -> None:
    spec = vit(block(), block())
    plan = random_plan(spec, KINDS)
    small = compact(random_model(spec), plan)
    small.reset_classifier(3)
    images = random_images(spec)
    same(outputs(plan.lift(small), images), outputs(small, images))


@pytest.mark.parametrize("change", ["classes", "no_classes", "image"])
def test_a_model_changed_outside_its_blocks_can_be_pruned_again(change: str) -> None:
    model = random_model(SPECS["uniform"]).double()
    once = compact(model, random_plan(model.spec, ("head", "mlp", "channel")))
    if change == "image":
        once.set_input_size((20, 24))
    else:
        once.reset_classifier(3 if change == "classes" else 0)
    images = random_images(once.spec)
    plan = Plan.without(once.spec, random_drop(once.spec, ("qk", "v", "mlp")))
    twice = compact(once, plan.with_selection([None, select("mlp", once.spec.num_patches - 1)]))
    both = Plan.of(twice)
    assert both.spec() == twice.spec
    assert both.dense.blocks == model.spec.blocks
    lifted = outputs(both.lift(twice), images)
    same(lifted if change != "no_classes" else lifted[..., list(both.channels)], outputs(twice, images))


def test_a_model_of_other_blocks_is_refused_before_it_is_scored() -> None:
    once = prune(random_model(SPECS["uniform"]), "magnitude", {"macs": "70%"})
    once.prune_intermediate_layers([0])
    with pytest.raises(PruningError, match=r"the 2 blocks of width 32 that model\.plan leaves .* got 1 of width"):
        prune(once, "snp", {"macs": "70%"}, data=iter([]))
    once.plan = None
    assert prune(once, "magnitude", {"macs": "70%"}).spec.depth == 1


def test_json_round_trip() -> None:
    plan = random_plan(SPECS["cp_vit_cascade"], ("head", "qk", "v", "mlp"))
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        (("channels",), [], "channels"),
        (("channels",), [0, 0, 1], "ascending"),
        (("channels",), [0, 99], "invalid plan: plan: channels: expected indices below 29"),
        (("channels",), [0, True], "channels"),
        (("channels",), [-1], "channels"),
        (("norm_gain",), float("inf"), "norm_gain"),
        (("norm_gain",), 0, "norm_gain"),
        (("blocks",), [], "expected one for each"),
        (("blocks", 0, "heads"), [2], "below 2"),
        (("blocks", 0, "qk"), [[0]], "entry a kept head"),
        (("blocks", 0, "qk", 1), [], "at least 1"),
        (("blocks", 0, "v", 0), [8], "below 8"),
        (("blocks", 0, "mlp"), [24], "below 24"),
        (("blocks", 0, "mlp"), "all", "mlp"),
        (("blocks", 0, "surprise"), 1, "surprise"),
        (("blocks", 0, "has_attn"), False, "removed attention"),
        (("dense", "embed_dim"), 10**9, "embed_dim"),
        (("format_version",), 2, "format_version: .*, got 2"),
    ],
)
def test_a_malformed_plan_is_refused_by_name(path: tuple[str | int, ...], value: object, reason: str) -> None:
    data = Plan.keep_all(vit(block(), block())).to_dict()
    at = data
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    with pytest.raises(PruningError, match=reason):
        Plan.from_dict(data)


def test_a_plan_of_another_shape_is_refused() -> None:
    plan = Plan.keep_all(vit(block(), block()))
    with pytest.raises(PruningError, match="of this shape"):
        compact(random_model(vit(block())), plan)
    with pytest.raises(PruningError, match="of this shape"):
        plan.mask(random_model(vit(block())))
    with pytest.raises(PruningError, match="this plan leaves"):
        plan.lift(random_model(vit(block())))


def test_attention_pooling_fixes_the_residual_width() -> None:
    spec = SPECS["attention_pool"]
    with pytest.raises(PruningError, match="attention pooling"):
        Plan.without(spec, {groups_of(spec, ("channel",))[0]: [0]})


def test_what_a_training_run_has_set_is_kept() -> None:
    spec = vit(block(), block(), block(), distilled=True)
    rates = {"drop_rate": 0.1, "pos_drop_rate": 0.2, "patch_drop_rate": 0.3, "proj_drop_rate": 0.4}
    dense = PrunedViT(spec, **rates, attn_drop_rate=0.5, drop_path_rate=0.6)
    dense.set_distilled_training(True)
    dense.set_grad_checkpointing(True)
    (mlp,) = (group for group in groups_of(spec, ("mlp",)) if group.block == 2)
    small = compact(dense, Plan.without(spec, {mlp: range(12)}))
    assert small.distilled_training
    assert small.grad_checkpointing
    assert (small.head_drop.p, small.pos_drop.p, small.patch_drop.prob) == (0.1, 0.2, 0.3)
    assert [b.attn.attn_drop for b in small.blocks] == [0.5] * 3
    assert (small.blocks[2].attn.proj_drop.p, small.blocks[2].mlp.drop1.p) == (0.4, 0.4)
    assert [getattr(b.drop_path1, "drop_prob", 0.0) for b in small.blocks] == [0.0, 0.3, 0.6]
    images = random_images(spec)
    torch.manual_seed(0)
    again = compact(dense, Plan.keep_all(spec)).train()(images)
    torch.manual_seed(0)
    torch.testing.assert_close(again, dense.train()(images))
    chosen = Plan.keep_all(spec).with_selection([None, select("mlp", 5), None])
    assert isinstance(compact(dense, chosen).patch_drop, torch.nn.Identity)
