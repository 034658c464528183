"""Graphs of accelerated models: whole, with the live weights as inputs and no pack inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import nn

from prunevit.nn import accelerate, restore
from tests.nn.models import check_model, images, tiny
from tests.specs import SPECS, random_images, random_model

pytestmark = pytest.mark.filterwarnings("error:.*reference path")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def ops_in(graph: Any) -> list[str]:
    return [node.target.__name__ for node in graph.nodes if "prunevit" in str(node.target)]


def test_one_graph_that_follows_the_weights() -> None:
    """The one test that compiles with inductor."""
    eager = tiny(depth=1)
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    compiled = torch.compile(model, fullgraph=True)
    check_model(compiled, eager, x)
    for each in (model, eager):
        each.blocks[0].attn.qkv.weight.data.mul_(1.5)
        with torch.no_grad():
            each.blocks[0].mlp.fc2.bias.add_(1)
    check_model(compiled, eager, x)


@pytest.mark.parametrize("name", ["every_head_its_own_width", "partial_reads_and_writes", "evit", "no_heads"])
def test_pruned_models_in_one_graph(name: str) -> None:
    eager = random_model(SPECS[name])
    model = torch.compile(accelerate(copy.deepcopy(eager)), fullgraph=True, backend="aot_eager")
    check_model(model, eager, random_images(SPECS[name]))


def test_a_compiled_model_follows_mode_and_gradients() -> None:
    eager = tiny(depth=1, proj_drop_rate=0.5)
    compiled = torch.compile(accelerate(copy.deepcopy(eager)), fullgraph=True, backend="aot_eager")
    x = images(eager)
    check_model(compiled, eager, x)
    compiled.train()
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in compiled.parameters())
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="drops at a rate of 0.5 in training"):
        compiled(x)
    check_model(compiled.eval(), eager, x)


def test_an_exported_program_follows_the_weights() -> None:
    eager = tiny(depth=1)
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    batch = torch.export.Dim("batch", min=1, max=8)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert ops_in(program.graph) == ["block.default"]
    module = program.module()
    check_model(module, eager, x)
    check_model(module, eager, images(eager, 5))
    for each in (module, eager):
        each.get_parameter("blocks.0.attn.proj.weight").data.mul_(1.5)
        each.get_parameter("blocks.0.norm2.weight").data.mul_(1.5)
    check_model(module, eager, x)


def test_an_export_with_gradients_is_the_reference() -> None:
    model = accelerate(tiny(depth=1))
    with pytest.warns(RuntimeWarning, match="gradients are on"):
        program = torch.export.export(model, (images(model),))
    assert ops_in(program.graph) == []
    check_model(program.module(), restore(model), images(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_is_the_reference() -> None:
    eager = tiny()
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"torch\.jit\.trace is recording"):
        traced = torch.jit.trace(model, x)
    check_model(traced, eager, x)


def test_a_symbolic_trace_is_the_reference() -> None:
    eager = tiny()
    model, x = accelerate(copy.deepcopy(eager)), images(eager)
    no_mask = {"attn_mask": None, "is_causal": False}
    with pytest.warns(RuntimeWarning, match="x is a Proxy"):
        traced = torch.fx.symbolic_trace(model, no_mask)
    check_model(traced, eager, x)
    timms = timm.models.create_feature_extractor(model, ["norm"])
    with torch.no_grad():
        torch.testing.assert_close(timms(x)["norm"], eager.forward_features(x), rtol=1e-4, atol=1e-4)


def test_a_symbolic_trace_of_lone_modules() -> None:
    eager = nn.Sequential(timm.layers.Mlp(12, 20, 12), Attention(12, 3)).eval()
    with pytest.warns(RuntimeWarning, match="x is a Proxy"):
        traced = torch.fx.symbolic_trace(accelerate(copy.deepcopy(eager)))
    check_model(traced, eager, torch.randn(2, 5, 12) + 3)
