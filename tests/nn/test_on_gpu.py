"""timm models on kernels on a GPU: block by block, in 16 bits, and that a write to a weight is seen."""

from __future__ import annotations

import copy

import pytest
import torch

from prunevit.nn import accelerate
from prunevit.nn._module import Check
from tests.nn.models import check_model, images, tiny

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:.*reference path")]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("check", ["contents", "versions"])
def test_a_model_and_its_blocks(check: Check, dtype: torch.dtype) -> None:
    assert torch.cuda.is_available(), "tests marked gpu need an NVIDIA GPU that PyTorch sees"
    eager = tiny().to("cuda", dtype)
    model, x = accelerate(copy.deepcopy(eager), check=check), images(eager).to("cuda", dtype)
    tokens = eager.norm_pre(eager._pos_embed(eager.patch_embed(x)))
    for factor in (1.0, 1.5):
        for changed in (model, eager):
            changed.blocks[1].mlp.fc1.weight.mul_(factor)
        assert all(block.refusal(tokens) is None for block in model.blocks)
        for _ in range(3):
            check_model(model, eager, x)
        for ours, theirs in zip(model.blocks, eager.blocks):
            check_model(ours, theirs, tokens)


@torch.no_grad()
def test_calls_on_a_stream_of_their_own() -> None:
    eager = tiny().to("cuda", torch.bfloat16)
    model, x = accelerate(copy.deepcopy(eager)), images(eager).to("cuda", torch.bfloat16)
    want = model(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        got = model(x)
    torch.cuda.synchronize()
    assert torch.equal(got, want)
