"""A ViT pruned by the real Torch-Pruning computes the same as a PrunedViT, and in the runtime."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from prunevit.errors import UnsupportedModel
from prunevit.interop import from_torch_pruning
from prunevit.runtime import Runtime

from .test_masks import agree, images, timm_vit

tp = pytest.importorskip("torch_pruning", reason="the test extra installs torch-pruning")


def forward(self: Any, x: Tensor, **_: Any) -> Tensor:
    """timm's, for a width that is no longer E: what Torch-Pruning's example puts in its place."""
    b, n, _c = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    if self.fused_attn:
        x = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    else:
        x = (q * self.scale @ k.transpose(-2, -1)).softmax(-1) @ v
    return self.proj(x.transpose(1, 2).reshape(b, n, -1))  # type: ignore[no-any-return]


def pruned_vit(*, edit: bool = True, model: VisionTransformer | None = None, **options: Any) -> VisionTransformer:
    model = model or timm_vit()
    heads = {}
    for module in model.modules():
        if isinstance(module, Attention):
            module.forward = MethodType(forward, module)  # type: ignore[method-assign]
            heads[module.qkv] = module.num_heads
    pruner = tp.pruner.MetaPruner(
        model, images(1), importance=tp.importance.GroupMagnitudeImportance(p=2), num_heads=heads,
        ignored_layers=[model.head], **options,
    )  # fmt: skip
    pruner.step()
    for module in model.modules():
        if isinstance(module, Attention) and edit:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
    return model.eval()


CASES: dict[str, dict[str, Any]] = {
    "head_dims_and_width": {"pruning_ratio": 0.3, "prune_head_dims": True},
    "whole_heads": {
        "pruning_ratio": 0.25,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "head_pruning_ratio": 0.34,
    },
    "all_layers_at_once": {"pruning_ratio": 0.4, "global_pruning": True, "prune_head_dims": True},
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_pruned_model_computes(name: str, fused: bool) -> None:
    model = pruned_vit(**CASES[name])
    for block in model.blocks:
        block.attn.fused_attn = fused
    ours = from_torch_pruning(model)
    assert ours.spec.params() == sum(p.numel() for p in model.parameters())
    assert ours.spec.embed_dim < 24
    agree(ours, copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(Runtime(ours, device="cpu")(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_asks_for_the_edits_that_torch_pruning_leaves_to_its_user() -> None:
    with pytest.raises(
        UnsupportedModel, match=r"blocks\.0\.attn: expected num_heads and head_dim .* pruner\.num_heads"
    ):
        from_torch_pruning(pruned_vit(edit=False, **CASES["head_dims_and_width"]))


def dense_scale(self: Any, x: Tensor, **_: Any) -> Tensor:
    self.fused_attn = False
    self.scale = 2.0
    return forward(self, x)


def test_refuses_a_forward_that_computes_something_else() -> None:
    """One that keeps the dense head's scale, and one that cannot run."""
    model = pruned_vit(**CASES["head_dims_and_width"])
    model.blocks[0].attn.forward = MethodType(dense_scale, model.blocks[0].attn)
    with pytest.raises(UnsupportedModel, match="some forward computes something else"):
        from_torch_pruning(model)
    del model.blocks[0].attn.forward  # timm's, which reads a width that pruning leaves alone
    with pytest.raises(UnsupportedModel, match="expected a model that runs after pruning"):
        from_torch_pruning(model)


def test_no_layer_scale_is_small_enough_to_hide_another_forward() -> None:
    model = timm_vit(init_values=1e-5)
    for block in model.blocks:
        torch.nn.init.constant_(block.ls1.gamma, 1e-5)
    model = pruned_vit(model=model, **CASES["whole_heads"])
    agree(from_torch_pruning(model), copy.deepcopy(model))
    model.blocks[0].attn.forward = MethodType(dense_scale, model.blocks[0].attn)
    with pytest.raises(UnsupportedModel, match="some forward computes something else"):
        from_torch_pruning(model)
    assert bool((model.blocks[0].ls1.gamma == 1e-5).all())


def test_refuses_what_is_no_vit() -> None:
    with pytest.raises(UnsupportedModel, match="Linear"):
        from_torch_pruning(torch.nn.Linear(2, 2))
