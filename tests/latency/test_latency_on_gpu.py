"""A latency budget on a GPU: steps timed by its own clock, whole models as the runtime replays them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prunevit
from tests.specs import block, random_model, vit

pytestmark = pytest.mark.gpu


@pytest.mark.timeout(300)  # some thirty compilations
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_budget_on_a_gpu_is_met_by_the_whole_model(dtype: str, tmp_path: Path) -> None:
    assert torch.cuda.is_available(), "tests marked gpu need an NVIDIA GPU that PyTorch sees"
    spec = vit(*[block((64,) * 6, (64,) * 6, 1536)] * 4, embed_dim=384, img_size=(224, 224), patch_size=(16, 16))
    on = {"device": "cuda", "batch": 64, "dtype": dtype, "table": tmp_path / "table.json", "tolerance": 0.2}
    small = prunevit.prune(random_model(spec), "magnitude", {"latency": "60%"}, on=on)
    report = small.provenance["latency"]
    assert report["gpu"] == torch.cuda.get_device_name()
    assert report["dtype"] == dtype
    assert report["measured_ms"] <= 1.2 * report["limit_ms"]
    assert abs(report["error"]) <= 0.2
