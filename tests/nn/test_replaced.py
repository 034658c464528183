"""A method or a class that somebody put in the place of a module's own is what runs, in a model as without kernels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunevit import Runtime
from prunevit.errors import UnsupportedModel
from prunevit.nn import accelerate
from tests.nn.models import images, tiny
from tests.nn.test_accelerate import subclassed
from tests.nn.test_whole_model import whole
from tests.specs import SPECS, random_images, random_model

pytestmark = pytest.mark.filterwarnings("error:.*reference path")


def doubled(module: Any) -> None:
    """Its class becomes one made from it, whose forward gives twice as much."""
    kind = type(module)
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, *a, **k: 2 * kind.forward(self, *a, **k)})


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("name", ["", "blocks.0", "blocks.0.attn", "blocks.1.mlp.fc1", "patch_embed", "head"])
@pytest.mark.parametrize("make", [tiny, lambda: random_model(SPECS["uniform"])], ids=["timm", "pruned"])
def test_a_class_made_from_a_modules_own(make: Callable[[], Any], name: str, called_before: bool) -> None:
    eager = make()
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    with torch.no_grad():
        before = model(x) if called_before else None
    for each in (eager, model):
        doubled(each.get_submodule(name))
    assert not whole(model, x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a block may well refuse too
        got, want = model(x), eager(x)
    assert before is None or (want - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


# what a block computes with besides its forward
OWN_METHODS: dict[str, Callable[[Any], Any]] = {
    "a_modules_own": lambda m: setattr(m.blocks[0].attn, "_attend", lambda q, k, v, mask, c: 0 * v),
    "a_blocks_own": lambda m: setattr(m.blocks[0], "_mlp_half", lambda x: x),
    "a_classs": lambda m: subclassed(m.blocks[0], _mlp_half=lambda self, x: x),
}


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("name", OWN_METHODS)
def test_a_method_that_is_no_forward(name: str, called_before: bool) -> None:
    eager = random_model(SPECS["uniform"])
    model, x = accelerate(copy.deepcopy(eager)), random_images(SPECS["uniform"])
    with torch.no_grad():
        before = model(x) if called_before else None
    for each in (eager, model):
        OWN_METHODS[name](each)
    assert not whole(model, x)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="reference path"):
        got, want = model(x), eager(x)
    assert before is None or (want - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_an_empty_class_of_ones_own_is_no_kernels() -> None:
    model = accelerate(tiny())
    subclassed(model.blocks[0])
    with torch.no_grad():
        reason = model.blocks[0].refusal(torch.ones(1, 7, 24))
    assert reason == "it is a Mine, made from the class that accelerate gave it"


@pytest.mark.parametrize(
    "kind", [VisionTransformer, TimmBlock, TimmAttention, timm.layers.Mlp, timm.layers.LayerNorm, nn.Linear]
)
def test_a_method_replaced_for_all(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, pruned = tiny(), random_model(SPECS["uniform"])
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    with torch.no_grad():
        before = model(x)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a, **k: 2 * forward(self, *a, **k))
    assert not whole(model, x)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, want = model(x), eager(x)
    assert (want - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    with pytest.raises(UnsupportedModel, match="forward is replaced, for all"):
        Runtime(eager, device="cpu")
    if kind in (timm.layers.Mlp, timm.layers.LayerNorm, nn.Linear):
        with pytest.raises(UnsupportedModel, match="forward is replaced, for all"):
            Runtime(pruned, device="cpu")
    monkeypatch.undo()
    assert whole(model, x)


def plain_block(self: Any, x: Any) -> Any:
    x = x + self.attn(self.norm1(x))
    return x + 2 * self.mlp(self.norm2(x))


def plain_model(self: Any, x: Any) -> Any:
    return 2 * self.forward_head(self.forward_features(x))


@pytest.mark.parametrize(("kind", "forward"), [(TimmBlock, plain_block), (VisionTransformer, plain_model)])
def test_a_replaced_forward_is_given_what_a_call_gives(
    kind: Any, forward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not know of masks."""
    eager = tiny()
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    monkeypatch.setattr(kind, "forward", forward)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
