"""What is pruned on a GPU is there whole, and computes there what it does on a CPU."""

from __future__ import annotations

import pytest
import torch

from prunevit import gate
from prunevit.pruning import prune
from tests.specs import SPECS, random_images, random_model

pytestmark = pytest.mark.gpu


@torch.no_grad()
@pytest.mark.parametrize("group", ["head", "qk", "v", "mlp", "channel", "read"])
def test_a_pruned_model_stays_on_its_gpu(group: str) -> None:
    assert torch.cuda.is_available(), "tests marked gpu need an NVIDIA GPU that PyTorch sees"
    model, images = random_model(SPECS["uniform"]), random_images(SPECS["uniform"])
    want = prune(model, "magnitude", groups=(group,), pruning_ratio=0.5)
    small = prune(model.cuda(), "magnitude", groups=(group,), pruning_ratio=0.5)
    assert small.spec == want.spec
    assert {tensor.device.type for tensor in (*small.parameters(), *small.buffers())} == {"cuda"}
    assert gate(small) < 1e-3
    torch.testing.assert_close(small(images.cuda()).cpu(), want(images), rtol=1e-2, atol=1e-2)
    again = prune(small, "magnitude", groups=(group,), pruning_ratio=0.25)
    assert again(images.cuda()).isfinite().all()
