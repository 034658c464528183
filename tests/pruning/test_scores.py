"""The baselines against slow, literal transcriptions of what they say they measure."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from prunevit.models import PrunedViT
from prunevit.pruning import KINDS, Plan, compact, groups_of
from prunevit.pruning.magnitude import Magnitude
from prunevit.pruning.taylor import Taylor
from tests.specs import SPECS, random_images, random_model

NAMES = ("every_head_its_own_width", "partial_writes_with_layer_scale", "distilled", "no_biases", "clip_like")


def squares_that_go(model: PrunedViT, plan: Plan) -> float:
    """Σ w² of all weights that surgery leaves out."""
    total = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    return total - sum(float(p.detach().double().square().sum()) for p in compact(model, plan).parameters())


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_is_the_norm_of_what_surgery_removes(name: str) -> None:
    model = random_model(SPECS[name])
    groups = [g for g in groups_of(model.spec, ("qk", "v", "mlp", "channel", "read")) if g.size > 1]
    scores = Magnitude().score(model, groups, None, 0)
    for group in groups:
        for unit in (0, group.size - 1):
            try:
                plan = Plan.without(model.spec, {group: [unit]}, rescale_norms=False)
            except ValueError:
                continue  # the only channel of a list
            want = squares_that_go(model, plan) ** 0.5
            assert float(scores[group][unit]) == pytest.approx(want, rel=1e-5)


def test_taylor_scores_frozen_weights_as_any_others() -> None:
    model = random_model(SPECS["layer_scale"])
    data, groups = [(random_images(model.spec), torch.tensor([0, 3, 1]))], groups_of(model.spec, KINDS)
    before = Taylor().score(model, groups, data, 0)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    after = Taylor().score(model, groups, data, 0)
    assert all(torch.equal(before[group], after[group]) for group in groups)
    assert [name for name, weight in model.named_parameters() if weight.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize("name", NAMES)
def test_taylor_is_the_gradient_of_a_gate_on_each_unit(name: str) -> None:
    """Multiply each unit's output by a gate g = 1; the score is |∂L/∂g|."""
    model = random_model(SPECS[name]).double()
    images, labels = random_images(model.spec, 4).double(), torch.tensor([0, 3, 1, 6])
    groups = groups_of(model.spec, KINDS)
    scores = Taylor().score(model, groups, [(images, labels)], 0)
    for group in groups:
        gate = torch.ones(group.size, dtype=torch.float64, requires_grad=True)
        hooks = []

        def on(module: torch.nn.Module, hook: object, hooks: list[object] = hooks) -> None:
            hooks.append(module.register_forward_hook(hook))  # type: ignore[arg-type]

        def before(module: torch.nn.Module, hook: object, hooks: list[object] = hooks) -> None:
            hooks.append(module.register_forward_pre_hook(hook))  # type: ignore[arg-type]

        if group.kind == "channel":
            for path, module in model.named_modules():
                if isinstance(module, torch.nn.LayerNorm) and path:
                    on(module, lambda m, x, y, gate=gate: y * gate)
        elif group.kind == "sublayer":
            for at, i in enumerate(group.blocks):
                block = model.blocks[i]
                last = block.attn.proj if ".attn." in group.layer else block.mlp.fc2
                on(last, lambda m, x, y, gate=gate, at=at: y * gate[at])
        else:
            block, shape = model.blocks[group.block], model.spec.blocks[group.block]
            if group.kind == "read":
                linear = block.attn.qkv if ".attn." in group.layer else block.mlp.fc1
                before(linear, lambda m, x, gate=gate: (x[0] * gate,))
            elif group.kind == "mlp":
                before(block.mlp.fc2, lambda m, x, gate=gate: (x[0] * gate,))
            elif group.kind == "head":
                wide = gate.repeat_interleave(torch.tensor(shape.v_dims))
                before(block.attn.proj, lambda m, x, gate=wide: (x[0] * gate,))
            else:
                dims = shape.qk_dims if group.kind == "qk" else shape.v_dims
                parts = [gate if h == group.head else torch.ones(w, dtype=torch.float64) for h, w in enumerate(dims)]
                wide = torch.cat(parts)
                if group.kind == "v":
                    before(block.attn.proj, lambda m, x, gate=wide: (x[0] * gate,))
                else:
                    rest = torch.ones(shape.qkv_dim - len(wide), dtype=torch.float64)
                    wide = torch.cat([wide, rest])
                    on(block.attn.qkv, lambda m, x, y, gate=wide: y * gate)
        loss = F.cross_entropy(model(images), labels, reduction="sum")
        want = torch.autograd.grad(loss, gate)[0].abs()
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(scores[group], want, rtol=1e-8, atol=1e-10)
