from __future__ import annotations

import pytest
import torch

from prunevit_kernels._aot import stand_in_target
from prunevit_kernels.ragged_attention import _triton
from tests.kernels.half_precision import check
from tests.kernels.half_precision_cases import EVERY_CASE, named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", EVERY_CASE)
def test_kernel(name: str, dtype: torch.dtype) -> None:
    # deviations are from a row's first value: where that is an outlier, log2 K bits of fp32's are lost
    units = 128 if name == "norm_linear.outlier_first" and dtype == torch.float32 else None
    check(named(name), stand_in_target(dtype), units=units)


def test_more_images_than_a_grid_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "MOST_IMAGES", 2)
    check(named("ragged_attention.one_query"), stand_in_target(torch.float32))
