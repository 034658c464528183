"""A whole model as one plan: when it runs so, what it must notice, and that it computes what the model does."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import tv_tensors

from prunevit import Runtime
from prunevit.nn import accelerate, restore
from prunevit_kernels.library import packs
from tests.nn.models import check_model, images, randomise, tiny
from tests.nn.test_accelerate import SWITCHES
from tests.specs import SPECS, random_images, random_model

pytestmark = pytest.mark.filterwarnings("error:.*reference path")


def whole(model: Any, x: Any) -> bool:
    with torch.no_grad():
        return model.refusal(x) is None


@pytest.mark.parametrize("switch", SWITCHES)
def test_timm_models(switch: str) -> None:
    model = accelerate(tiny(**SWITCHES[switch]))
    assert whole(model, images(model)) == (switch != "attention_pool")


@pytest.mark.parametrize("name", SPECS)
def test_pruned_models(name: str) -> None:
    spec = SPECS[name]
    if not spec.blocks:
        return
    model, x = accelerate(random_model(spec)), random_images(spec)
    channels = any(c is not None for b in spec.blocks for c in (b.attn_reads, b.attn_writes, b.mlp_reads, b.mlp_writes))
    assert whole(model, x) == (spec.attn_pool is None and not channels), name


def test_no_classifier_and_a_distilled_one() -> None:
    for name, fields in (
        ("vit_tiny_patch16_224", {"num_classes": 0}),
        ("vit_tiny_patch16_224", {"num_classes": 0, "global_pool": ""}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 0}),
    ):
        eager = tiny(name, **fields)
        model = accelerate(copy.deepcopy(eager))
        assert whole(model, images(eager))
        check_model(model, eager, images(eager))


def test_other_image_sizes() -> None:
    eager = tiny(dynamic_img_size=True)
    model = accelerate(copy.deepcopy(eager))
    for size in ((8, 12), (4, 20), (16, 8)):
        x = torch.randn(2, 3, *size) + 3
        assert whole(model, x)
        check_model(model, eager, x)


def test_an_image_that_does_not_fit_is_timms_to_refuse() -> None:
    model = accelerate(tiny())
    with torch.no_grad(), pytest.raises(AssertionError, match="Input height"):
        model(torch.zeros(1, 3, 12, 12))


def test_strided_images_and_those_of_inference_mode() -> None:
    eager = tiny()
    model, x = accelerate(copy.deepcopy(eager)), images(eager).transpose(2, 3).contiguous().transpose(2, 3)
    assert not x.is_contiguous()
    check_model(model, eager, x)
    with torch.inference_mode():
        inside = model(images(eager))
    with torch.no_grad():
        assert torch.equal(model(images(eager)), inside)


# what a model's modules say of it may change between two calls
CHANGES: dict[str, Callable[[Any], Any]] = {
    "norm_eps": lambda m: setattr(m.norm, "eps", 0.5),
    "norm_removed": lambda m: setattr(m, "norm", nn.Identity()),
    "head_replaced": lambda m: setattr(m, "head", nn.Linear(24, 7)),
    "head_scaled": lambda m: m.head.weight.data.mul_(2),
    "reset_classifier": lambda m: m.reset_classifier(5),
    "pooling": lambda m: setattr(m, "global_pool", "avg"),
    "positions": lambda m: m.pos_embed.data.mul_(9),
    "class_token": lambda m: m.cls_token.data.mul_(9),
    "patches": lambda m: m.patch_embed.proj.weight.data.mul_(2),
    "patch_bias_removed": lambda m: setattr(m.patch_embed.proj, "bias", None),
    "patches_dilated": lambda m: setattr(m.patch_embed.proj, "weight", nn.Parameter(torch.ones(24, 3, 4, 4))),
    "a_block_less": lambda m: m.blocks.__delitem__(0),
    "a_block_twice": lambda m: m.blocks.append(m.blocks[0]),
    "blocks_swapped": lambda m: setattr(m, "blocks", nn.Sequential(m.blocks[1], m.blocks[0])),
    "scale": lambda m: (setattr(m.blocks[0].attn, "scale", 3.0), setattr(m.blocks[0].attn, "fused_attn", False)),
    "own_forward_features": lambda m: setattr(
        m, "forward_features", lambda x, **how: 2 * type(m).forward_features(m, x, **how)
    ),
    "own_forward_of_the_head": lambda m: setattr(m.head, "forward", lambda x: x.sum(-1)),
    "a_block_of_another_type": lambda m: m.blocks.__setitem__(0, nn.Linear(24, 24)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    model = accelerate(tiny())
    x = images(model)
    with torch.no_grad():
        before = model(x)
    CHANGES[name](model)
    with torch.no_grad():
        got = model(x)
        want = restore(model)(x)
    assert want.shape != before.shape or (want - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_prefix_tokens_that_a_pool_leaves_out() -> None:
    eager = tiny(reg_tokens=1, global_pool="avg")
    eager.num_prefix_tokens = 3
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    assert not whole(model, x)
    check_model(model, eager, x)


def test_a_pruned_model_that_left_its_spec() -> None:
    """Its modules are what counts."""
    for change in (
        lambda m: setattr(m.norm, "eps", 0.5),
        lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()),
        lambda m: setattr(m.blocks[1].attn, "scale", 3.0),
        lambda m: m.blocks[0].attn.qk_dims.reverse(),
        lambda m: setattr(m.blocks[1], "norm2", nn.Identity()),
        lambda m: setattr(m, "norm", nn.Identity()),
        lambda m: setattr(m.blocks[0], "attn_reads", torch.arange(m.embed_dim - 1, -1, -1)),
    ):
        spec = SPECS["every_head_its_own_width"]
        model, x = accelerate(random_model(spec)), random_images(spec)
        assert whole(model, x)
        change(model)
        assert not whole(model, x)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a block may well refuse too
            got = model(x)
            want = restore(model)(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_tied_weights_are_one_plan() -> None:
    eager = tiny("deit_tiny_distilled_patch16_224")
    eager.head_dist.weight = eager.head.weight
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    assert whole(model, x)
    check_model(model, eager, x)
    for each in (eager, model):
        each.head.weight.data.mul_(2)
    check_model(model, eager, x)


def test_a_parameter_set_again_is_in_the_plan() -> None:
    eager = tiny()
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    with torch.no_grad():
        model(x)
    linear = model.blocks[0].mlp.fc1
    prune.identity(linear, "weight")
    prune.remove(linear, "weight")
    assert list(linear._parameters) == ["bias", "weight"]
    assert whole(model, x)
    check_model(model, eager, x)


@pytest.mark.parametrize("way", ["buffer", "attribute"])
@pytest.mark.parametrize(
    "name", ["head.weight", "blocks.0.norm1.bias", "blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc1.bias"]
)
def test_a_weight_that_is_no_parameter(name: str, way: str) -> None:
    eager = tiny()
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    with torch.no_grad():
        model(x)
    for each in (eager, model):
        path, _, leaf = name.rpartition(".")
        module = each.get_submodule(path)
        tensor = getattr(module, leaf).detach()
        delattr(module, leaf)
        if way == "buffer":
            module.register_buffer(leaf, tensor)
        else:
            setattr(module, leaf, tensor)
    with torch.no_grad():
        reason = model.refusal(x)
        assert reason == "a weight is a buffer" if way == "buffer" else name in reason
        got, want = model(x), eager(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_whoever_watches_is_named() -> None:
    model = accelerate(tiny())
    x, want = images(model), "a function mode is on"
    with torch.no_grad():
        made = packs.made
        with torch.device("cpu"):
            assert model.refusal(x).startswith(want)
            model(x)
        assert packs.made == made + 2, "each block ran on kernels"
        with FakeTensorMode():
            assert model.refusal(x) == "a dispatch mode is on, which is to see the ops"
        assert model.refusal(tv_tensors.Image(x)) == "x is a Image"
        assert model.refusal(x) is None


def test_hooks_inside_fire() -> None:
    model, fired = accelerate(tiny()), []
    x = images(model)
    outer = model.register_forward_hook(lambda *_: fired.append("model"))
    assert whole(model, x), "a hook on the model is not inside it"
    handle = model.patch_embed.register_forward_hook(lambda *_: fired.append("patch_embed"))
    with torch.no_grad():
        model(x)
        handle.remove()
        model(x)
    assert fired == ["patch_embed", "model", "model"]
    outer.remove()
    assert whole(model, x)


def test_whoever_watches_the_ops_sees_the_blocks() -> None:
    model, seen = accelerate(tiny()), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x = images(model)
    with torch.no_grad():
        want = model(x)
        with Watch():
            got = model(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert [name for name in seen if "prunevit" in name] == ["prunevit.block.default"] * 2


def test_a_change_that_leaves_the_shape_builds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built = accelerate(tiny()), []
    assert whole(model, images(model))
    monkeypatch.setattr("prunevit.models.tensors.PrunedViT", lambda *a, **k: built.append(a))
    model.step = 1
    assert whole(model.train().eval(), images(model))
    assert built == []


def test_training_mode_goes_block_by_block() -> None:
    eager = tiny()
    model = accelerate(copy.deepcopy(eager)).train()
    assert not whole(model, images(model))
    check_model(model, eager, images(model))
    assert whole(model.eval(), images(model))


def test_an_accelerated_model_is_a_runtimes_too() -> None:
    model = accelerate(tiny())
    x = images(model)
    with torch.no_grad():
        torch.testing.assert_close(Runtime(model, device="cpu")(x), model(x), rtol=1e-5, atol=1e-5)


def test_most_of_timms_models_run_whole() -> None:
    ran = 0
    for name in [n for module in ("vision_transformer", "deit") for n in timm.list_models(module=module)][::6]:
        eager = tiny(name, num_classes=5, num_heads=1, embed_dim=8, patch_size=4)
        if type(eager.blocks[0]).__name__ != "Block":
            continue
        model, x = accelerate(copy.deepcopy(eager)), images(eager, 1)
        randomise(eager)
        model.load_state_dict(eager.state_dict())
        if whole(model, x):
            ran += 1
            with torch.no_grad():
                want = eager(x)
                torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()), msg=name)
    assert ran >= 12
