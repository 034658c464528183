"""Tests that need an NVIDIA GPU. ``pytest -m gpu`` selects them; where there is none they fail, and never skip."""

from __future__ import annotations

import pytest
import torch

from prunevit_kernels import Target


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def target(request: pytest.FixtureRequest) -> Target:
    assert torch.cuda.is_available(), "tests marked gpu need an NVIDIA GPU that PyTorch sees"
    return Target("cuda", torch.device("cuda", torch.cuda.current_device()), request.param)
