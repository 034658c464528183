"""PrunedViT against an independent transcription, and timm's surface on ragged shapes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from prunevit import shapes
from prunevit.errors import InputError, SpecError
from prunevit.models import PrunedViT
from prunevit.spec import AttnPoolSpec, BlockSpec, TokenSelect, ViTSpec
from tests.models.slow import slow_vit
from tests.specs import SPECS, block, random_images, random_model, select, vit

EXTRA = {
    "equal_heads_apart": vit(block((5, 9, 5), (7, 3, 7))),
    "published_width_307": vit(block((13, 6), (12, 6)), embed_dim=307),
    "dynamic_image_with_padding": vit(block(), dynamic_img_size=True, dynamic_img_pad=True, img_size=(13, 18)),
    "select_everything": vit(block(select=select("mlp", 12)), block()),
    "fused_token_with_nothing_dropped": vit(block(select=select("mlp", 12, fuse=True)), block()),
    "select_twice_after_one_attention": vit(block(select=select("mlp", 8)), block(select=select("attn", 4)), block()),
    "cascade_with_a_fused_token": vit(
        block(select=select("mlp", 6, cascade=True, fuse=True)), block(select=select("mlp", 3, cascade=True, fuse=True))
    ),
    "distilled_without_classes": vit(block(), distilled=True, num_classes=0),
    "attention_pool_with_prefix": vit(
        block(),
        embed_dim=32,
        reg_tokens=2,
        global_pool="map",
        pool_include_prefix=True,
        attn_pool=AttnPoolSpec(num_heads=4, mlp_dim=40),
    ),
    "attention_pool_after_selection": vit(
        block(select=select("mlp", 4, fuse=True)),
        embed_dim=32,
        global_pool="map",
        attn_pool=AttnPoolSpec(num_heads=4, mlp_dim=31),
    ),
}
ALL = SPECS | EXTRA


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    error = (got.double() - want).abs().max()
    assert error <= 2e-5 * want.abs().max(), f"error {error:.3g} of {want.abs().max():.3g}"


@pytest.mark.parametrize("name", ALL)
def test_computes_what_the_transcription_computes(name: str) -> None:
    spec = ALL[name]
    model, images = random_model(spec), random_images(spec)
    with torch.no_grad():
        assert_close(model(images), slow_vit(spec, model.state_dict(), images))


@pytest.mark.parametrize("name", ALL)
def test_in_fp64_it_is_exact(name: str) -> None:
    spec = ALL[name]
    model, images = random_model(spec).double(), random_images(spec, batch=2).double()
    want = slow_vit(spec, model.state_dict(), images)
    with torch.no_grad():
        assert (model(images) - want).abs().max() <= 1e-11 * want.abs().max() + 1e-13


@pytest.mark.parametrize("name", ALL)
def test_counts_its_parameters(name: str) -> None:
    model = PrunedViT(ALL[name])
    assert model.spec.params() == sum(p.numel() for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_trains(name: str) -> None:
    """Every parameter that the output depends on gets a finite gradient, with and without checkpointing."""
    spec = ALL[name]
    model, images = random_model(spec), random_images(spec)
    gradients = []
    for save_memory in (False, True):
        model.zero_grad()
        model.train().set_grad_checkpointing(save_memory)
        model(images).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert all(g.isfinite().all() for g in gradients[0].values())
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert not unused, f"without a gradient: {unused}"
    for name_, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name_], gradient)


@st.composite
def small_specs(draw: st.DrawFn) -> ViTSpec:
    """Any small ragged spec."""
    width = draw(st.integers(2, 9))
    flag = st.booleans()

    def channels() -> tuple[int, ...] | None:
        return draw(st.none() | st.sets(st.integers(0, width - 1), min_size=1).map(lambda s: tuple(sorted(s))))

    def one_block() -> BlockSpec:
        has_attn, has_mlp = draw(flag), draw(flag)
        heads = draw(st.integers(0, 3)) if has_attn else 0
        return BlockSpec(
            qk_dims=tuple(draw(st.integers(1, 5)) for _ in range(heads)),
            v_dims=tuple(draw(st.integers(1, 5)) for _ in range(heads)),
            attn_scale=draw(st.sampled_from([0.125, 0.3, 1.0])),
            mlp_dim=draw(st.integers(0, 6)) if has_mlp else 0,
            has_attn=has_attn,
            has_mlp=has_mlp,
            attn_reads=channels(),
            attn_writes=channels(),
            mlp_reads=channels(),
            mlp_writes=channels(),
        )

    class_token = draw(flag)
    distilled = class_token and draw(flag)
    pools = ["", "avg", "avgmax", "max", *(["token"] if class_token else [])]
    img_size, patch_size = ((draw(sides), draw(sides)) for sides in (st.integers(4, 9), st.integers(2, 4)))
    whole = all(image % patch == 0 for image, patch in zip(img_size, patch_size))
    return ViTSpec(
        img_size=img_size,
        patch_size=patch_size,
        in_chans=draw(st.integers(1, 3)),
        num_classes=draw(st.integers(0, 4)),
        embed_dim=width,
        blocks=tuple(one_block() for _ in range(draw(st.integers(0, 3)))),
        class_token=class_token,
        distilled=distilled,
        reg_tokens=0 if distilled else draw(st.integers(0, 2)),
        no_embed_class=draw(flag),
        dynamic_img_size=whole and draw(flag),
        act=draw(st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "relu"])),
        norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        **{
            name: draw(flag)
            for name in ("patch_bias", "qkv_bias", "proj_bias", "mlp_bias", "embed_norm", "pre_norm", "layer_scale")
        },
        final_norm=draw(flag),
        fc_norm=False if distilled else draw(flag),
        global_pool="token" if distilled else draw(st.sampled_from(pools)),
        pool_include_prefix=draw(flag),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(small_specs())
def test_any_small_spec(spec: ViTSpec) -> None:
    model = random_model(spec).double()
    assert spec.params() == sum(p.numel() for p in model.parameters())
    (down, across), (p, q) = spec.grid_size, spec.patch_size
    if spec.dynamic_img_size:  # such a model takes whole patches only
        spec = spec.replace(img_size=(down * p, across * q))
    images = random_images(spec, batch=2).double()
    want = slow_vit(spec, model.state_dict(), images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), want, rtol=1e-9, atol=1e-9)
    assert ViTSpec.from_dict(spec.to_dict()) == spec


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_selection(data: st.DataObject) -> None:
    """Selections anywhere in a model of five blocks, some without heads."""
    rule = data.draw(st.sampled_from(["max_attention", "class_attention"]))
    cascade, fuse, left = data.draw(st.booleans()), data.draw(st.booleans()), 12
    blocks = [block()]
    for _ in range(4):
        heads = data.draw(st.sampled_from([((), ()), ((3, 5, 3), (4, 4, 4)), ((6,), (2,))]))
        chosen = None
        if data.draw(st.booleans()):
            keep = data.draw(st.integers(1, left))
            before = data.draw(st.sampled_from(["attn", "mlp"]))
            chosen, left = TokenSelect(before=before, rule=rule, keep=keep, cascade=cascade, fuse=fuse), keep + fuse
        blocks.append(block(*heads, select=chosen))
    spec = vit(*blocks, reg_tokens=data.draw(st.integers(0, 2)), global_pool="avg")
    model, images = random_model(spec).double(), random_images(spec, batch=2).double()
    with torch.no_grad():
        torch.testing.assert_close(model(images), slow_vit(spec, model.state_dict(), images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in shapes.names() if "gmac" in shapes.entry(n)])
def test_counts_the_published_operations(name: str) -> None:
    published = shapes.entry(name)["gmac"]
    assert shapes.get(name).macs() / 1e9 == pytest.approx(published, rel=1e-3)


def counted_macs(spec: ViTSpec) -> int:
    model = PrunedViT(spec).eval().requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, spec.in_chans, *spec.img_size))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["uniform", "partial_reads_and_writes", "no_heads", "attention_pool", "distilled"])
def test_counts_the_operations_that_pytorch_counts(name: str) -> None:
    """QKᵀ and AV included; these shapes have Dqk = Dv, so that SDPA pads nothing."""
    assert SPECS[name].macs() == counted_macs(SPECS[name])


def test_macs_count_attention() -> None:
    spec = shapes.get("deit_tiny")
    without = sum(cost.macs - cost.attn_macs for cost in spec.per_block())
    assert sum(cost.macs for cost in spec.per_block()) - without == 12 * 197 * 197 * 2 * 192
    assert spec.macs() == counted_macs(spec)
    assert spec.macs(batch=3) == 3 * spec.macs()


def test_the_softmax_scale_is_the_dense_heads() -> None:
    """Halving Dqk by removing zero rows must change nothing: 1/√Dqk would."""
    dense = vit(block((8, 8), (8, 8)))
    model = random_model(dense)
    qkv = model.blocks[0].attn.qkv
    with torch.no_grad():
        for head, part in itertools.product(range(2), range(2)):
            start = 16 * part + 8 * head
            qkv.weight[start + 4 : start + 8] = 0
            qkv.bias[start + 4 : start + 8] = 0
    pruned = random_model(vit(block((4, 4), (8, 8))))
    state = copy.deepcopy(model.state_dict())
    kept = [16 * part + 8 * head + i for part in range(2) for head in range(2) for i in range(4)] + list(range(32, 48))
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"):
        state[name] = state[name][kept]
    pruned.load_state_dict(state)
    images = random_images(dense)
    with torch.no_grad():
        torch.testing.assert_close(pruned(images), model(images), rtol=1e-5, atol=1e-5)


# -- the surface of timm


@pytest.mark.parametrize("name", ["uniform", "registers", "one_head_13_by_12", "average_pool_fc_norm"])
def test_forward_intermediates(name: str) -> None:
    spec = SPECS[name]
    model, images = random_model(spec), random_images(spec)
    with torch.no_grad():
        final, taken = model.forward_intermediates(images, norm=True)
        assert [t.shape for t in taken] == [(3, spec.embed_dim, 3, 4)] * spec.depth
        prefix = spec.num_prefix_tokens
        assert torch.equal(final, model.forward_features(images))
        assert torch.equal(taken[-1].flatten(2).transpose(1, 2), final[:, prefix:])
        assert torch.equal(model.forward_head(final), model(images))
        last = model.get_intermediate_layers(images, n=1, norm=True)
        assert torch.equal(last[0], final[:, prefix:])
        result = model.forward_intermediates(images, [0], output_dict=True, return_prefix_tokens=True, stop_early=True)
        assert ("image_intermediates_prefix" in result) == (prefix > 0)


def test_forward_intermediates_of_a_model_that_selects() -> None:
    spec = SPECS["select_before_mlp"]
    model, images = random_model(spec), random_images(spec)
    with pytest.raises(InputError, match="NLC"):
        model.forward_intermediates(images)
    with torch.no_grad():
        _, taken = model.forward_intermediates(images, output_fmt="NLC")
    assert [t.shape[1] for t in taken] == [12, 5, 5]


def test_attention_masks() -> None:
    """As timm passes them: bool or additive, [N, N] or with a head dimension, and causal."""
    spec = ALL["equal_heads_apart"]
    model, images = random_model(spec), random_images(spec)
    n = spec.num_patches + 1
    with torch.no_grad():
        everything = torch.ones(n, n, dtype=torch.bool)
        torch.testing.assert_close(model(images, attn_mask=everything), model(images))
        causal = model.forward_features(images, is_causal=True)
        torch.testing.assert_close(model.forward_features(images, attn_mask=everything.tril()), causal)
        assert not torch.allclose(causal, model.forward_features(images))
        per_head = torch.randn(1, 3, n, n)
        by_head = model.forward_features(images, attn_mask=per_head)
        swapped = model.forward_features(images, attn_mask=per_head[:, [2, 1, 0]])
        assert not torch.allclose(by_head, swapped)
        _, by_intermediates = model.forward_intermediates(images, norm=True, output_fmt="NLC", attn_mask=per_head)
        assert torch.equal(by_intermediates[-1], by_head[:, 1:])


@pytest.mark.parametrize("mask", [{"is_causal": True}, {"attn_mask": torch.ones(13, 13, dtype=torch.bool)}])
def test_a_mask_with_token_selection_is_refused(mask: dict[str, object]) -> None:
    spec = SPECS["select_before_mlp"]
    with pytest.raises(InputError, match="selects tokens"):
        random_model(spec)(random_images(spec), **mask)


def test_reset_classifier_keeps_the_spec_true() -> None:
    model = random_model(SPECS["uniform"])
    images = random_images(model.spec)
    model.reset_classifier(3, "avg")
    assert (model.num_classes, model.global_pool, model.spec.num_classes) == (3, "avg", 3)
    assert model(images).shape == (3, 3)
    assert model.spec.params() == sum(p.numel() for p in model.parameters())
    model.reset_classifier(0, "")
    assert model(images).shape == (3, 13, 32)
    with pytest.raises(SpecError, match="attn_pool"):
        model.reset_classifier(2, "map")
    assert model.num_classes == 0, "a refused change leaves the model as it was"


def test_reset_classifier_of_a_distilled_model() -> None:
    model = random_model(SPECS["distilled"])
    model.reset_classifier(5)
    assert [head.out_features for head in model.get_classifier()] == [5, 5]
    with pytest.raises(SpecError, match="distilled"):
        model.reset_classifier(5, "avg")


def test_reset_classifier_removes_an_attention_pool() -> None:
    model = random_model(SPECS["attention_pool"])
    model.reset_classifier(4, "avg")
    assert model.attn_pool is None
    assert model(random_images(model.spec)).shape == (3, 4)
    assert model.spec.params() == sum(p.numel() for p in model.parameters())


def test_distilled_training_gives_both_heads() -> None:
    model = random_model(SPECS["distilled"])
    images = random_images(model.spec)
    mean = model(images)
    model.set_distilled_training()
    assert torch.equal(model(images), mean), "in evaluation they stay averaged"
    one, other = model.train()(images)
    torch.testing.assert_close((one + other) / 2, mean)
    pre = model.forward_head(model.forward_features(images), pre_logits=True)
    assert pre.shape == (3, model.num_features)


def test_set_input_size_keeps_the_spec_true() -> None:
    model = random_model(SPECS["registers"])
    model.set_input_size((20, 24))
    assert model(random_images(model.spec)).shape == (3, 7)
    assert model.spec.grid_size == (5, 6)
    assert model.spec.params() == sum(p.numel() for p in model.parameters())
    model.set_input_size(patch_size=(2, 2))
    assert model(random_images(model.spec)).shape == (3, 7)


def test_set_input_size_refuses_fewer_tokens_than_are_kept() -> None:
    model = random_model(SPECS["select_before_mlp"])
    with pytest.raises(SpecError, match=r"blocks\.1\.select\.keep"):
        model.set_input_size((4, 4))
    assert model.spec == SPECS["select_before_mlp"]


def test_dynamic_image_sizes() -> None:
    model = random_model(SPECS["uniform"].replace(dynamic_img_size=True))
    assert model(torch.randn(2, 3, 24, 8)).shape == (2, 7)
    with pytest.raises(AssertionError, match="divisible"):
        model(torch.randn(2, 3, 23, 8))
    padding = random_model(ALL["dynamic_image_with_padding"])
    assert padding(torch.randn(2, 3, 23, 9)).shape == (2, 7)


def test_dropouts_are_arguments() -> None:
    rates = ("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    images = random_images(SPECS["uniform"])
    for rate in rates:
        model = PrunedViT(SPECS["uniform"], **{rate: 0.5}).train()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.5)
            differs = any(not torch.equal(model(images), model(images)) for _ in range(4))
        assert differs, rate
        assert torch.equal(model.eval()(images), model(images)), rate
    with pytest.raises(SpecError, match="patch_drop_rate"):
        PrunedViT(SPECS["select_before_mlp"], patch_drop_rate=0.5)


def test_initialises_as_timm_does() -> None:
    model = PrunedViT(vit(block(), block(), embed_dim=64, layer_scale=True), init_values=0.1)
    qkv = model.blocks[0].attn.qkv
    assert 0.015 < qkv.weight.std().item() < 0.025
    assert not qkv.bias.any()
    assert model.blocks[0].ls1.gamma[0].item() == pytest.approx(0.1)
    assert model.cls_token.abs().max().item() < 1e-4
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token", "dist_token"}
    assert set(model.group_matcher()) == {"stem", "blocks"}


@pytest.mark.parametrize("name", ["partial_reads_and_writes", "evit", "every_head_its_own_width"])
def test_compiles(name: str) -> None:
    spec = SPECS[name]
    model, images = random_model(spec), random_images(spec)
    with torch.no_grad():
        got = torch.compile(model, backend="eager", fullgraph=True)(images)
        torch.testing.assert_close(got, model(images))


@pytest.mark.parametrize("name", ["partial_reads_and_writes", "evit", "cp_vit_cascade", "no_heads", "attention_pool"])
def test_runs_under_autocast(name: str) -> None:
    spec = SPECS[name]
    model, images = random_model(spec), random_images(spec)
    with torch.autocast("cpu", torch.bfloat16):
        model(images).float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
