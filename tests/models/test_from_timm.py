"""Every Vision Transformer that timm registers: converted and equal, or refused by attribute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent, LayerNorm
from timm.models import PretrainedCfg
from torch import nn

from prunevit.errors import UnsupportedModel
from prunevit.models import from_timm, spec_of
from prunevit.spec import ViTSpec

NAMES = [name for module in ("vision_transformer", "deit") for name in timm.list_models(module=module)]
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": (8, 12)}
REASONS = {
    "mlp is SwiGLU": 12,
    "mlp is GluMlp": 3,
    "attn.norm is LayerNorm": 4,
    "norm1 is RmsNorm": 1,
    "attn is DiffAttention": 2,
    "blocks.0 is ParallelThingsBlock": 2,
    "blocks.0 is ResPostBlock": 1,
    "blocks.0 is ParallelScalingBlock": 4,
    "blocks.0 is DiffParallelScalingBlock": 1,
}


def tiny(name: str, **fields: Any) -> nn.Module:
    """A model with its own switches, small, every parameter random: a norm or a scale of ones would hide itself."""
    model: nn.Module = timm.create_model(name, **(TINY | fields)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + 0.1)
    return model


def images(model: Any, batch: int = 2) -> torch.Tensor:
    return (
        torch.randn(batch, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1)) + 3
    )


def walk() -> dict[str, str]:
    """What becomes of each registered model: its kind of head, or the reason why it is refused."""
    outcome = {}
    for name in NAMES:
        model: Any = tiny(name)
        try:
            pruned = from_timm(model).eval()
        except UnsupportedModel as error:
            outcome[name] = f"refused: {error}"
            continue
        assert list(pruned.state_dict()) != []
        assert pruned.state_dict().keys() == model.state_dict().keys(), name
        assert pruned.spec.params() == sum(p.numel() for p in model.parameters()), name
        with torch.no_grad():
            want, got = model(images(model)), pruned(images(model))
        assert got.shape == want.shape, name
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name
        outcome[name] = "attention pool" if isinstance(model.attn_pool, AttentionPoolLatent) else "standard"
    return outcome


def test_every_registered_model() -> None:
    outcome = walk()
    for name, result in outcome.items():
        print(f"{name:60s} {result}")
    refused = {name: result for name, result in outcome.items() if result.startswith("refused")}
    assert set(outcome.values()) - set(refused.values()) <= {"standard", "attention pool"}
    if timm.__version__ == "1.0.31":
        counts = Counter("refused" if name in refused else result for name, result in outcome.items())
        assert counts == {"standard": 131, "attention pool": 18, "refused": 30}
        reasons = {part: sum(part in result for result in refused.values()) for part in REASONS}
        assert reasons == REASONS
        assert sum(REASONS.values()) == 30


SWITCHES: dict[str, dict[str, Any]] = {
    "no_qkv_bias": {"qkv_bias": False},
    "no_proj_and_fc_bias": {"proj_bias": False},
    "nine_registers": {"reg_tokens": 9},
    "no_embed_class": {"no_embed_class": True},
    "pre_norm": {"pre_norm": True},
    "no_final_norm": {"final_norm": False},
    "fc_norm_of_class_token": {"fc_norm": True},
    "layer_scale": {"init_values": 0.1},
    "average_pool": {"global_pool": "avg"},
    "average_pool_without_class_token": {"global_pool": "avg", "class_token": False},
    "average_pool_with_prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1},
    "max_pool": {"global_pool": "max"},
    "avgmax_pool": {"global_pool": "avgmax", "fc_norm": False},
    "no_pool": {"global_pool": ""},
    "attention_pool": {"global_pool": "map"},
    "attention_pool_with_prefix": {"global_pool": "map", "pool_include_prefix": True},
    "no_classes": {"num_classes": 0},
    "embed_norm": {"embed_norm_layer": "layernorm"},
    "gelu_by_name": {"act_layer": "gelu"},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "relu": {"act_layer": "relu"},
    "dynamic_image": {"dynamic_img_size": True},
    "dynamic_image_and_padding": {"dynamic_img_size": True, "dynamic_img_pad": True},
    "static_image_and_padding": {"dynamic_img_pad": True, "img_size": (8, 12)},
    "one_channel": {"in_chans": 1},
    "eps": {"norm_layer": "layernorm"},
    "narrow_mlp": {"mlp_ratio": 0.3},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch(switch: str) -> None:
    model: Any = tiny("vit_tiny_patch16_224", **SWITCHES[switch])
    pruned, x = from_timm(model), images(model)
    assert pruned.spec == ViTSpec.from_timm(model) == ViTSpec.from_dict(pruned.spec.to_dict())
    assert pruned.spec.params() == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pruned.forward_features(x), model.forward_features(x), rtol=1e-5, atol=1e-5)
        for got, want in zip(pruned.forward_intermediates(x)[1], model.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_other_image_sizes_of_a_dynamic_model() -> None:
    model: Any = tiny("vit_tiny_patch16_224", dynamic_img_size=True, dynamic_img_pad=True)
    x = torch.randn(2, 3, 17, 21) + 3
    with torch.no_grad():
        torch.testing.assert_close(from_timm(model)(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mask", ["causal", "additive", "bool"])
def test_masks_as_timm_takes_them(mask: str) -> None:
    model: Any = tiny("vit_tiny_patch16_224")
    pruned, x = from_timm(model), images(model)
    given: dict[str, Any] = {"is_causal": True}
    if mask != "causal":
        additive = torch.randn(7, 7)
        given = {"attn_mask": additive if mask == "additive" else (additive > 0) | torch.eye(7, dtype=torch.bool)}
    with torch.no_grad():
        torch.testing.assert_close(pruned(x, **given), model(x, **given), rtol=1e-5, atol=1e-5)


def test_distilled_heads() -> None:
    model: Any = tiny("deit_tiny_distilled_patch16_224").train()
    pruned, x = from_timm(model), images(model)
    assert pruned.training
    for vit in (model, pruned):
        vit.set_distilled_training()
    torch.testing.assert_close(pruned(x), model(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pruned.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


def test_weights_are_copied() -> None:
    """Query, key and value biases included; training the copy leaves the original as it was."""
    model: Any = tiny("deit_tiny_patch16_224")
    pruned, x = from_timm(model), images(model)
    before = model(x)
    assert torch.equal(pruned.blocks[0].attn.qkv.bias, model.blocks[0].attn.qkv.bias)
    assert pruned.blocks[0].attn.qkv.bias.abs().min() > 0
    with torch.no_grad():
        for parameter in pruned.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert torch.equal(model(x), before)


def test_dtype_and_origin_come_along() -> None:
    model: Any = tiny("deit_tiny_patch16_224").to(torch.bfloat16)
    model.pretrained_cfg = PretrainedCfg(architecture="deit_tiny_patch16_224", tag="fb_in1k", crop_pct=0.9).to_dict()
    pruned = from_timm(model)
    assert {p.dtype for p in pruned.parameters()} == {torch.bfloat16}
    assert pruned.provenance == {"base_model": "deit_tiny_patch16_224.fb_in1k"}
    assert pruned.pretrained_cfg["crop_pct"] == 0.9


class Doubled(LayerNorm):
    @classmethod
    def of(cls, norm: nn.LayerNorm) -> nn.LayerNorm:
        doubled = cls(norm.normalized_shape, eps=norm.eps)
        doubled.load_state_dict(norm.state_dict())
        return doubled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def altered(change: str) -> nn.Module:
    model: Any = tiny("vit_tiny_patch16_224", init_values=0.1, global_pool="map" if "pool" in change else "token")
    block, width = model.blocks[1], model.embed_dim
    if change == "another_eps":
        block.norm2 = LayerNorm(width, eps=1e-3)
    elif change == "norm_without_bias":
        block.norm1 = nn.LayerNorm(width, bias=False)
    elif change == "another_activation":
        block.mlp.act = nn.ReLU()
    elif change == "unknown_activation":
        model.blocks[0].mlp.act = nn.SiLU()
    elif change == "one_block_without_scale":
        block.ls1 = block.ls2 = nn.Identity()
    elif change == "one_scale_missing":
        block.ls2 = nn.Identity()
    elif change == "one_bias_missing":
        block.mlp.fc2 = nn.Linear(block.mlp.fc2.in_features, width, bias=False)
    elif change == "attention_gate":
        block.attn.gate = nn.Linear(width, width)
    elif change == "wide_heads":
        model = tiny("vit_tiny_patch16_224", embed_dim=320, num_heads=2)
    elif change == "query_norm":
        block.attn.q_norm = LayerNorm(block.attn.head_dim)
    elif change == "mlp_norm":
        block.mlp.norm = LayerNorm(block.mlp.fc1.out_features)
    elif change == "another_head":
        model.head = nn.Sequential(nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 1000))
    elif change == "adapter":
        block.attn.proj = nn.Sequential(block.attn.proj, nn.Linear(width, width))
    elif change == "pruned_rows":
        block.attn.qkv = nn.Linear(width, 3 * width - 6)
    elif change == "no_positions":
        model.pos_embed = None
    elif change == "more_prefix_tokens":
        model.num_prefix_tokens = 3
    elif change == "pool_query_norm":
        model.attn_pool.q_norm = LayerNorm(model.attn_pool.head_dim)
    elif change == "pool_activation":
        model.attn_pool.mlp.act = nn.ReLU()
    elif change == "pool_of_its_tokens":
        model.attn_pool.pool = "avg"
    elif change == "overlapping_patches":
        model.patch_embed.proj.stride = (2, 2)
    elif change == "padded_patches":
        model.patch_embed.proj.padding = (4, 4)
    elif change == "norm_of_ones_own":
        block.norm1 = Doubled.of(block.norm1)
    elif change == "activation_of_ones_own":
        block.mlp.act = type("Own", (nn.GELU,), {})()
    elif change == "scale_without_weights":
        block.ls1 = nn.Hardtanh()
    elif change == "head_of_ones_own":
        model.head = type("Cosine", (nn.Linear,), {})(width, 1000)
    elif change == "dropout_of_ones_own":
        model.pos_drop = nn.Hardtanh()
    elif change == "quantised":
        block.attn.qkv = type("Linear", (nn.Linear,), {"__module__": "quantised"})(width, 3 * width)
    elif change == "hook_before":
        block.mlp.register_forward_pre_hook(lambda module, x: (2 * x[0],))
    elif change == "hook_on_the_model":
        model.register_forward_hook(lambda module, x, y: 2 * y)
    elif change == "own_forward":
        block.attn.forward = lambda x, **how: 2 * x
    elif change == "own_method":
        model.pool = lambda x: x.mean(1)
    return model  # type: ignore[no-any-return]


ATTRIBUTES = {
    "another_eps": r"blocks\.1\.norm2\.eps is 0\.001: expected 1e-06",
    "norm_without_bias": r"blocks\.1\.norm1: expected a LayerNorm with weight and bias",
    "another_activation": r"blocks\.1: act is relu, expected gelu",
    "unknown_activation": r"blocks\.0\.mlp\.act is SiLU",
    "one_block_without_scale": r"blocks\.1: layer_scale is False, expected True",
    "one_scale_missing": r"blocks\.1\.ls2",
    "one_bias_missing": r"blocks\.1\.mlp\.fc2",
    "attention_gate": r"blocks\.1\.attn\.gate is Linear",
    "wide_heads": r"blocks\.0\.attn\.head_dim is 160: expected at most 128",
    "query_norm": r"blocks\.1\.attn\.q_norm is LayerNorm",
    "mlp_norm": r"blocks\.1\.mlp\.norm is LayerNorm",
    "another_head": r"head is Sequential",
    "adapter": r"blocks\.1\.attn\.proj is Sequential",
    "pruned_rows": r"blocks\.1\.attn\.qkv\.weight",
    "no_positions": r"pos_embed is None",
    "more_prefix_tokens": r"num_prefix_tokens is 3: expected 1, as many as the model has$",
    "pool_query_norm": r"attn_pool\.q_norm is LayerNorm",
    "pool_activation": r"attn_pool\.mlp\.act",
    "pool_of_its_tokens": r"attn_pool\.pool is 'avg'",
    "overlapping_patches": r"patch_embed\.proj is no plain cut into patches",
    "padded_patches": r"patch_embed\.proj is no plain cut into patches",
    "norm_of_ones_own": r"blocks\.1\.norm1 is Doubled: expected LayerNorm$",
    "activation_of_ones_own": r"blocks\.1\.mlp\.act is Own: expected GELU or GELUTanh",
    "scale_without_weights": r"blocks\.1\.ls1 is Hardtanh: expected LayerScale or Identity",
    "head_of_ones_own": r"head is Cosine: expected Linear or Identity",
    "dropout_of_ones_own": r"pos_drop is Hardtanh",
    "quantised": r"blocks\.1\.attn\.qkv is quantised\.Linear: expected Linear",
    "hook_before": r"blocks\.1\.mlp has a forward hook",
    "hook_on_the_model": r"VisionTransformer has a forward hook, which may change what it computes: remove it",
    "own_forward": r"blocks\.1\.attn\.forward is replaced",
    "own_method": r"VisionTransformer\.pool is replaced",
}


@pytest.mark.parametrize("change", ATTRIBUTES)
def test_a_changed_model_is_refused_by_attribute(change: str) -> None:
    with pytest.raises(UnsupportedModel, match=ATTRIBUTES[change]):
        from_timm(altered(change))


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_another_architecture_is_refused_by_class(name: str) -> None:
    with pytest.raises(UnsupportedModel, match="expected timm's VisionTransformer"):
        spec_of(timm.create_model(name))


def test_what_is_no_timm_model_is_told_what_to_do() -> None:
    with pytest.raises(UnsupportedModel, match=r"str: expected timm's .*prunevit\.load reads a checkpoint"):
        from_timm("checkpoint")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModel, match=r"PrunedViT: .* its spec is model\.spec"):
        from_timm(from_timm(tiny("vit_tiny_patch16_224")))


def test_a_prr_pool_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="attn_pool is AttentionPoolPrr"):
        from_timm(tiny("vit_tiny_patch16_224", global_pool="prr"))


@pytest.mark.parametrize("fused", [True, False])
def test_the_scale_is_what_the_model_computes_with(fused: bool) -> None:
    """timm's fused attention leaves the scale to PyTorch, whatever its own attribute says."""
    model: Any = tiny("vit_tiny_patch16_224")
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 0.1
    x = images(model)
    torch.testing.assert_close(from_timm(model)(x), model(x))
