"""The CUDA extension as built and linked, on a machine in place of a GPU: Python, bindings, launches and PTX.

The emulator of tests/kernels/cuda runs the sources with stand-ins for the instructions that C++ has no name for. Here
nothing is replaced but CUDA's runtime library, and wgmma's descriptors mean what they mean in Triton's kernels.
"""

from __future__ import annotations

import math

import pytest
import torch

from prunevit_kernels import FusedMlp
from prunevit_kernels._aot import stand_in_target
from prunevit_kernels._configs import CUDA_MLP_KERNELS as KERNELS
from tests.kernels.cuda.emulation import H100, ONE_SM, RTX_4090, Gpu, draw
from tests.kernels.cuda.rules import assert_right
from tests.kernels.half_precision import rounded, same_bits

from .count import count
from .extension import EmulatedExtension
from .launch import TOGETHER
from .machine import Timing

GUARD = 40
ADVERSE = Timing(late_copies=True, late_products=True, order=3)
OVERWRITING = Timing(late_products=True, order=4)


def check(
    extension: EmulatedExtension, op: FusedMlp, rows: int, kernel: str | None, gpu: Gpu,
    timing: Timing = ADVERSE, dtype: torch.dtype = torch.bfloat16, pitch: int | None = None,
) -> str:  # fmt: skip
    """Run op between guard bands of NaN and hold it to the rules. Returns the kernel that ran."""
    op = rounded(op, dtype)
    pitch = pitch or -(-op.embed_dim // 8) * 8 + 8
    generator = torch.Generator().manual_seed(rows)
    values = (torch.randn(rows, op.embed_dim, generator=generator, dtype=torch.float64) + 3).to(dtype)
    storage = torch.full((GUARD + rows * pitch + GUARD,), math.nan, dtype=dtype)
    x = storage.as_strided((1, rows, op.embed_dim), (rows * pitch, pitch, 1), GUARD)
    x[0] = values
    extension.be(gpu, timing)
    mlp = extension.pack(op, stand_in_target(dtype))
    plan = mlp._planned(x, kernel)
    bound, _, held = mlp._bound(x, plan).args
    assert extension.launch(bound, held)
    assert_right(x[0].clone(), op, values)
    x[0] = values
    untouched = torch.full_like(storage, math.nan)
    untouched.as_strided(x.shape, x.stride(), GUARD)[0] = values
    assert same_bits(storage, untouched), "wrote between or beside the rows"
    return str(plan.kernel)


@pytest.mark.parametrize("timing", [TOGETHER, ADVERSE, OVERWRITING], ids=["together", "adverse", "overwriting"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel(extension: EmulatedExtension, kernel: str, timing: Timing) -> None:
    """snp_deit_tiny.block11 on three SMs: few row tiles, so that `split` and the GEMMs divide the hidden width."""
    assert check(extension, draw(153, 383), 40, kernel, Gpu(90, 3, H100.shared_limit), timing) == kernel


@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_gemms"])
@pytest.mark.parametrize(("embed", "hidden"), [(345, 307), (384, 77), (192, 1)])
def test_hopper_kernels_at_other_widths(extension: EmulatedExtension, kernel: str, embed: int, hidden: int) -> None:
    check(extension, draw(embed, hidden, gamma=True, act="gelu_tanh"), 20, kernel, ONE_SM)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_of_channels_and_rows_of_any_pitch(extension: EmulatedExtension, kernel: str) -> None:
    op = draw(45, 33, reads=tuple(range(0, 45, 2)), writes=tuple(range(44, 0, -3)), act="quick_gelu")
    check(extension, op, 9, kernel, ONE_SM, dtype=torch.float16, pitch=51)


@pytest.mark.parametrize("gpu", [H100, RTX_4090], ids=["H100", "RTX 4090"])
def test_the_kernel_that_the_table_chooses(extension: EmulatedExtension, gpu: Gpu) -> None:
    check(extension, draw(307, 100), 33, None, gpu, dtype=torch.float16)


def test_a_second_row_tile(extension: EmulatedExtension) -> None:
    """Past 128 rows the next tile begins, and its rows end within it."""
    for kernel in ("wgmma", "wgmma_gemms"):
        check(extension, draw(64, 96, act="relu"), 140, kernel, ONE_SM)


@pytest.mark.parametrize("timing", [ADVERSE, OVERWRITING], ids=["adverse", "overwriting"])
@pytest.mark.parametrize(("embed", "hidden"), [(21, 83), (330, 65)])
def test_several_row_tiles_a_block(extension: EmulatedExtension, embed: int, hidden: int, timing: Timing) -> None:
    """One block after another takes five tiles, two or three each, its weights again and again."""
    check(extension, draw(embed, hidden, act="relu"), 530, "wgmma", Gpu(90, 2, H100.shared_limit), timing)


@pytest.mark.parametrize("kernel", KERNELS)
def test_overlapping_launches(extension: EmulatedExtension, kernel: str) -> None:
    """Each launch is asked to begin early, and then only reads weights before the one ahead has ended."""
    extension.be(Gpu(90, 3, H100.shared_limit))
    mlp = extension.pack(rounded(draw(37, 210), torch.bfloat16), stand_in_target(torch.bfloat16, overlaps=True))
    x = torch.full((1, 9, 40), 3.0, dtype=torch.bfloat16)[..., :37]
    plan = mlp._planned(x, kernel)
    bound, _, held = mlp._bound(x, plan).args
    before = extension.library.overlapping_launches()
    extension.launch(bound, held)
    launches = {"fused": 1, "wgmma": 1, "split": 2}.get(kernel, 2 + (plan.splits > 1))
    assert extension.library.overlapping_launches() - before == launches


def test_code_that_does_not_wait_may_not_overlap(extension: EmulatedExtension) -> None:
    """A GPU newer than sm_90 runs what was compiled for sm_80, which waits for no launch ahead."""
    extension.be(Gpu(120, 3, RTX_4090.shared_limit))
    x = torch.full((1, 9, 40), 3.0, dtype=torch.bfloat16)[..., :37]
    op = rounded(draw(37, 210), torch.bfloat16)
    for kernel in ("fused", "two_gemms"):
        mlp = extension.pack(op, stand_in_target(torch.bfloat16))
        mlp._bound(x, mlp._planned(x, kernel))
        mlp = extension.pack(op, stand_in_target(torch.bfloat16, overlaps=True))
        with pytest.raises(RuntimeError, match=r"expected machine code for sm_90 or newer .* PRUNEVIT_CUDA_ARCHS"):
            mlp._bound(x, mlp._planned(x, kernel))


def test_a_smaller_shape_bound_later(extension: EmulatedExtension) -> None:
    """What one launch takes of shared memory must not become the limit of all."""
    extension.be(ONE_SM)
    ops = [rounded(draw(embed, 20), torch.bfloat16) for embed in (190, 30)]
    x = [torch.full((1, 3, 192), 3.0, dtype=torch.bfloat16)[..., : op.embed_dim] for op in ops]
    mlps = [extension.pack(op, stand_in_target(torch.bfloat16)) for op in ops]
    for kernel in KERNELS:
        bound = [mlp._bound(rows, mlp._planned(rows, kernel)).args for mlp, rows in zip(mlps, x, strict=True)]
        extension.launch(bound[0][0], bound[0][2])


def test_instructions_are_counted(extension: EmulatedExtension) -> None:
    """Eight warps: two steps of fc1, three of fc2, a fence and a commit for each, and three waits."""
    assert count(extension, "wgmma", 21, 37, rows=5)["wgmma"] == 8 * (2 + 3 + 2 * 2 + 3)
