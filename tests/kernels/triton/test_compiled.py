"""What the compiler made of the kernels, for GPUs that are not there: no spills, tensor cores, 16-byte async copies."""

from __future__ import annotations

import pytest
import torch

from prunevit_kernels._aot import Build
from prunevit_kernels.compile_check import INSTANCES, builds, faults

# few, for time: a body of each kind. `make compile-check` goes through all instances.
CHECKED = [
    "ragged_attention 6×(13, 12)",
    "ragged_attention mixed to 32",
    "fused_mlp 307, 1228, batch 64",
    "patch_embed 307, batch 1",
    "token_scores 6×25, batch 64",
    "select_tokens 384, batch 64",
]


@pytest.fixture(scope="module", params=[80, 90], ids="sm_{}".format)
def made(request: pytest.FixtureRequest) -> list[tuple[str, Build]]:
    return list(builds(CHECKED, request.param, torch.bfloat16))


def test_no_build_breaks_a_limit(made: list[tuple[str, Build]]) -> None:
    assert {f"{name}, {build.name}": faults(build) for name, build in made if faults(build)} == {}


def test_hopper_gets_its_own_matrix_instructions(made: list[tuple[str, Build]], request: pytest.FixtureRequest) -> None:
    """Attention and the linears with 64 rows a tile or more run on wgmma there, and nowhere else."""
    large = {build.name for name, build in made if build.wgmma}
    hopper = {"ragged_attention_kernel", "norm_linear_kernel", "linear_residual_kernel"}
    assert large >= hopper if "sm_90" in request.node.name else not large


def test_narrow_heads_leave_registers_for_four_programs_a_multiprocessor(made: list[tuple[str, Build]]) -> None:
    attention = next(build for name, build in made if name == "ragged_attention 6×(13, 12)")
    assert attention.registers * attention.threads * 4 <= 65536


def test_every_kind_of_kernel_is_among_the_instances() -> None:
    assert {name.split()[0] for name in INSTANCES} == {
        "ragged_attention", "norm_linear", "linear_residual", "fused_mlp", "patch_embed", "pool_head", "token_scores",
        "select_tokens",
    }  # fmt: skip


def test_a_spilling_build_is_a_fault() -> None:
    good = Build("linear_residual_kernel", 100, 0, 0, 1024, 8, 0, 4, 0, 0, 128)
    bad = Build("linear_residual_kernel", 255, 12, 16, 128 * 1024, 0, 0, 0, 2, 0, 512, serialised=True)
    assert faults(good) == []
    assert len(faults(bad)) == 7
