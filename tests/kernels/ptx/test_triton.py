"""The Triton kernels as compiled for sm_80 and sm_90, in bf16, run instruction by instruction.

Triton's interpreter runs the source, and knows no bf16 products. Here the compiler's output runs: asynchronous copies,
swizzled layouts, mma.sync, wgmma and its descriptors, with warps in a drawn order and copies as late as they may be.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from prunevit_kernels import _configs
from prunevit_kernels._aot import compiling_for
from prunevit_kernels._configs import Tile
from prunevit_kernels._launch import Call
from tests.kernels.half_precision import check
from tests.kernels.half_precision_cases import EVERY_CASE, linear_residual, named, norm_linear

from .launch import run_triton
from .machine import Timing
from .memory import DeviceMemory

ADVERSE = Timing(late_copies=True, late_products=True, order=7)
OVERWRITING = Timing(late_products=True, order=8)
# what has tensor cores or shared memory differs between the two; one of each such kind on the older one
ON_SM_80 = [
    "ragged_attention.mixed_up_to_64", "ragged_attention.tails_of_32_and_16", "ragged_attention.one_query",
    "ragged_attention.one_query_of_wide_heads",
    "ragged_attention.all_that_one_pass_takes", "ragged_attention.more_than_one_pass_takes",
    "norm_linear.width_89_to_35", "linear_residual.width_40_from_89", "fused_mlp.reads_and_writes_some",
    "patch_embed.patch_14", "token_scores.class_token", "select_tokens.longer_than_a_tile",
]  # fmt: skip


@pytest.mark.parametrize("timing", [ADVERSE, OVERWRITING], ids=["adverse", "overwriting"])
@pytest.mark.parametrize("op", ["norm_linear", "linear_residual"])
def test_tiles_of_wgmma(op: str, timing: Timing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 512 rows and more are cut into: copies must stay ahead of products, and not run over them."""
    case = norm_linear(307, 64, b=1, n=64) if op == "norm_linear" else linear_residual(64, 307, b=1, n=64)
    monkeypatch.setattr(_configs, "chosen", lambda *_: Tile(64, 64, warps=4, stages=3))
    monkeypatch.setattr(Call, "load", lambda call: partial(run_triton, call, DeviceMemory(), timing))
    with compiling_for(90, torch.bfloat16) as target:
        check(case, target)


@pytest.mark.parametrize("name", ON_SM_80)
def test_overlapping_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that begins while the one ahead of it still runs touches no memory until that one has ended."""

    def run(call: Call) -> None:
        compiled = call.compile()
        assert compiled.metadata.launch_pdl
        assert "griddepcontrol.wait" in compiled.asm["ptx"]
        run_triton(call, DeviceMemory(), ADVERSE)

    monkeypatch.setattr(Call, "load", lambda call: partial(run, call))
    with compiling_for(90, torch.bfloat16, overlaps=True) as target:
        check(named(name), target)


@pytest.mark.parametrize(
    ("capability", "name"), [*((90, name) for name in EVERY_CASE), *((80, name) for name in ON_SM_80)]
)
def test_compiled_kernel(capability: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Call, "load", lambda call: partial(run_triton, call, DeviceMemory(), ADVERSE))
    with compiling_for(capability, torch.bfloat16) as target:
        check(named(name), target)
