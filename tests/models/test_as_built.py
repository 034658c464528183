"""A PrunedViT runs by its spec: one whose modules say otherwise is refused by name, wherever that is asked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import prunevit
from prunevit.errors import UnsupportedModel
from prunevit.models import PrunedViT
from prunevit.models.as_built import changed_refusal
from prunevit.models.from_timm import as_pruned
from prunevit.nn import accelerate
from tests.specs import SPECS, random_images, random_model


class Twice(PrunedViT):
    def forward(self, *args: Any, **how: Any) -> Any:
        return 2 * super().forward(*args, **how)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "activation": (lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()), r"blocks\.1\.mlp\.act is ReLU: expected GELU"),
    "kind_of_gelu": (lambda m: setattr(m.blocks[1].mlp.act, "approximate", "tanh"), r"act\.approximate is 'tanh'"),
    "eps": (lambda m: setattr(m.norm, "eps", 0.5), r"norm\.eps is 0\.5: expected 1e-06"),
    "scale": (lambda m: setattr(m.blocks[0].attn, "scale", 3.0), r"blocks\.0\.attn\.scale is 3\.0: expected"),
    "learnt_scale": (lambda m: setattr(m.blocks[0].attn, "scale", torch.ones(2)), r"blocks\.0\.attn\.scale is tensor"),
    "channels": (lambda m: setattr(m.blocks[0], "attn_reads", torch.arange(31, -1, -1)), r"blocks\.0\.attn_reads is"),
    "no_attention": (lambda m: setattr(m.blocks[1], "attn", None), r"blocks\.1\.attn is missing"),
    "an_adapter": (lambda m: setattr(m.head, "adapter", nn.Linear(2, 2)), r"head\.adapter: expected no such module"),
    "head": (lambda m: setattr(m, "head", nn.Sequential(nn.Linear(32, 7))), "head is Sequential: expected Linear"),
    "classes": (lambda m: setattr(m, "head", nn.Linear(32, 9)), r"head\.out_features is 9: expected 7"),
    "weight": (lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(1, 32))), r"head\.weight: expected shape"),
    "weight_norm": (lambda m: nn.utils.parametrizations.weight_norm(m.head), "head is ParametrizedLinear"),
    "torch_pruning": (
        lambda m: torch.nn.utils.prune.l1_unstructured(m.head, "weight", 0.5),
        "head has a forward hook",
    ),
    "hook": (lambda m: m.blocks[0].register_forward_hook(lambda m, i, o: 2 * o), r"blocks\.0 has a forward hook"),
    "method": (lambda m: setattr(m.head, "forward", lambda x: x), r"head\.forward is replaced"),
    "subclass": (lambda m: setattr(m, "__class__", Twice), "Twice: expected a PrunedViT itself"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_by_name(name: str, tmp_path: Path) -> None:
    change, message = CHANGES[name]
    model = random_model(SPECS["uniform"])
    change(model)
    for use in (as_pruned, lambda m: prunevit.Runtime(m, device="cpu"), lambda m: prunevit.prune(m, "magnitude")):
        with pytest.raises(UnsupportedModel, match=message):
            use(model)
    if name not in ("weight", "weight_norm", "torch_pruning", "head", "classes", "no_attention", "an_adapter"):
        for check in (True, False):  # where the tensors still are those of a checkpoint
            with pytest.raises(UnsupportedModel, match=message):
                prunevit.save(model, tmp_path / "saved", check=check)
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", SPECS)
def test_what_the_model_does_to_itself_is_no_change(name: str) -> None:
    spec = SPECS[name]
    model = PrunedViT(
        spec, drop_rate=0.1, pos_drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1
    )
    assert as_pruned(model.train().double()) is model
    assert changed_refusal(copy.deepcopy(model).to("meta")) is None
    model.reset_classifier(3)
    assert changed_refusal(model) is None
    model.set_input_size((24, 32))
    assert changed_refusal(model) is None
    model.set_input_size(None, (8, 8))
    assert changed_refusal(model) is None
    if spec.blocks:
        assert changed_refusal(accelerate(model)) is None
        model.prune_intermediate_layers(1, prune_norm=True)
        assert changed_refusal(model) is None


def test_a_block_that_occurs_twice_runs_twice() -> None:
    model: Any = random_model(SPECS["uniform"])
    model.blocks[1] = model.blocks[0]
    images = random_images(model.spec)
    with torch.no_grad():
        torch.testing.assert_close(prunevit.Runtime(model, device="cpu")(images), model(images), rtol=1e-4, atol=1e-4)
