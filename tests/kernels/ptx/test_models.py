"""Whole models in bf16 on the kernels that Triton compiled for sm_90: the runtime's plan, its buffers, its pitches."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from prunevit.runtime import Runtime
from prunevit_kernels._aot import compiling_for
from prunevit_kernels._launch import Call
from prunevit_kernels.fused_mlp import _cuda
from tests.accuracy import held_to_eager
from tests.kernels.cuda.emulation import H100
from tests.specs import SPECS, random_images, random_model

from .extension import EmulatedExtension
from .launch import run_triton
from .machine import Timing
from .memory import DeviceMemory

# in 16 bits near-ties select other tokens: models that drop some are left to the kernels' own tests
MODELS = ["every_head_its_own_width", "no_heads_at_the_end", "partial_writes_with_layer_scale", "distilled"]
ADVERSE = Timing(late=True, order=11)


def check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bf16 = torch.bfloat16
    model, images = random_model(SPECS[name]).to(bf16).float(), random_images(SPECS[name], batch=2).to(bf16).float()
    monkeypatch.setattr(Call, "load", lambda call: partial(run_triton, call, DeviceMemory(), ADVERSE))
    with compiling_for(90, bf16) as target:
        monkeypatch.setattr("prunevit.runtime.runtime.choose_target", lambda *arguments: target)
        got = Runtime(model)(images)
    held_to_eager(model, images, got, bf16)


@pytest.mark.parametrize("name", MODELS)
def test_on_triton_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(name, monkeypatch)


@pytest.mark.parametrize("kernel", ["by_rule", "wgmma", "wgmma_gemms"])
def test_with_the_cuda_mlp(kernel: str, extension: EmulatedExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100 where the extension is built: its MLPs between Triton's kernels, on the same buffers."""
    ran = []

    def launch(mlp: Any, _device: int, held: Any) -> None:
        ran.append(extension.launch(mlp, held))

    extension.be(H100, ADVERSE)
    monkeypatch.setattr(_cuda, "pack", extension.pack)
    monkeypatch.setattr(_cuda, "_launch", launch)
    if kernel != "by_rule":
        monkeypatch.setenv(_cuda.KERNEL_VARIABLE, kernel)
    check("every_head_its_own_width", monkeypatch)
    assert len(ran) == sum(block.mlp_dim > 0 for block in SPECS["every_head_its_own_width"].blocks)
