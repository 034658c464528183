"""What the compiler made of the kernels, for GPUs that are not there: no spills, tensor cores, 16-byte async copies."""

from __future__ import annotations

import pytest
import torch

from prunevit_kernels._aot import Build
from prunevit_kernels.compile_check import INSTANCES, builds, faults

# few, for time: a body of each kind. `make compile-check` goes through all instances.
CHECKED = [
    "ragged_attention 6×(13, 12)",
    "ragged_attention 6×(13, 12), 577 tokens",
    "ragged_attention mixed to 32",
    "fused_mlp 307, 1228, batch 64",
    "fused_mlp 345, 307, batch 1",
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


def test_waiting_for_a_product_adds_nothing_to_a_step(made: list[tuple[str, Build]]) -> None:
    """An addition of zero that is one would be 64 instructions more."""
    expand = next(build for name, build in made if name == "fused_mlp 307, 1228, batch 64")
    assert 200 < expand.step <= (264 if expand.wgmma else 500)


def test_linears_load_what_they_need_ahead_of_their_loop(made: list[tuple[str, Build]]) -> None:
    """Columns that fill no tile, the residual, a row's first value: the first copies do not wait for them."""
    linears = [build for _, build in made if build.name in ("norm_linear_kernel", "linear_residual_kernel")]
    assert len(linears) == 4
    assert [build.exposed for build in linears] == [0, 0, 0, 0]


@pytest.mark.parametrize(("tokens", "programs"), [("", 3), (", 577 tokens", 5)], ids=["one_pass", "loop"])
def test_narrow_heads_leave_registers_for_some_programs_a_multiprocessor(
    tokens: str, programs: int, made: list[tuple[str, Build]]
) -> None:
    attention = next(build for name, build in made if name == f"ragged_attention 6×(13, 12){tokens}")
    assert attention.registers * attention.threads * programs <= 65536


def test_attention_in_one_pass_loads_16_bytes_at_a_time(made: list[tuple[str, Build]]) -> None:
    """197 rows of K and V and 64 of Q by 128 threads, and the same from the tail of 16 rows masked: 3 + 3 + 1."""
    attention = next(build for name, build in made if name == "ragged_attention 6×(13, 12)")
    assert attention.async_copies == 0
    assert attention.wide_loads >= 7


def test_attention_in_one_pass_issues_few_instructions(made: list[tuple[str, Build]]) -> None:
    """A block of 64 queries and 208 keys has 104 exponentials a thread, each with five instructions around it."""
    attention = next(build for name, build in made if name == "ragged_attention 6×(13, 12)")
    assert attention.instructions <= 900


def test_every_kind_of_kernel_is_among_the_instances() -> None:
    assert {name.split()[0] for name in INSTANCES} == {
        "ragged_attention", "norm_linear", "linear_residual", "fused_mlp", "patch_embed", "pool_head", "token_scores",
        "select_tokens",
    }  # fmt: skip


def test_a_spilling_build_is_a_fault() -> None:
    good = Build("linear_residual_kernel", 100, 0, 0, 1024, 8, 0, 4, 0, 0, 500, 128)
    bad = Build("linear_residual_kernel", 255, 12, 16, 128 * 1024, 0, 0, 0, 2, 0, 500, 512, serialised=True)
    assert faults(good) == []
    assert len(faults(bad)) == 7
