"""Whole models: the runtime's plan, its buffers and pitches, and every kernel on what the others left there."""

from __future__ import annotations

import pytest
import torch

from prunevit.runtime import Runtime
from prunevit_kernels._aot import stand_in_target
from tests.accuracy import held_to_eager
from tests.specs import SPECS, random_images, random_model

MODELS = [
    "every_head_its_own_width",
    "no_heads_at_the_end",
    "partial_reads_and_writes",
    "partial_writes_with_layer_scale",
    "clip_like",
    "registers_not_embedded",
    "distilled",
    "average_pool_fc_norm",
    "avgmax_pool_two_norms",
    "no_pool",
    "no_classes",
    "embed_norm",
    "image_with_a_remainder",
    "evit",
    "cp_vit_cascade",
]


@pytest.mark.parametrize("name", MODELS)
def test_computes_what_the_module_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    model, images = random_model(spec), random_images(spec, batch=2)
    target = stand_in_target(torch.float32)
    monkeypatch.setattr("prunevit.runtime.runtime.choose_target", lambda *arguments: target)
    held_to_eager(model, images, Runtime(model)(images), torch.float32, units=64)
