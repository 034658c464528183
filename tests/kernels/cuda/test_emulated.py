"""fused_mlp's CUDA kernels, unchanged, on a CPU: what they compute, what they write, and that they stay in bounds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from prunevit_kernels import FusedMlp
from prunevit_kernels._configs import CUDA_MLP_KERNELS as KERNELS
from tests.kernels.cuda.emulation import H100, ONE_SM, RTX_4090, Gpu, draw, emulate
from tests.kernels.cuda.rules import assert_right
from tests.kernels.half_precision import rounded, same_bits

GUARD = 40
TWO_SMS = Gpu(90, 2, 227 * 1024)


def check(
    emulator: Path,
    tmp_path: Path,
    op: FusedMlp,
    rows: int,
    *,
    dtype: torch.dtype = torch.float16,
    kernel: str | None,
    gpu: Gpu = ONE_SM,
    pitch: int | None = None,
    early: bool = False,
) -> str:
    """Run op on `rows` rows between guard bands of NaN and hold it to both rules. Returns the plan that ran."""
    op = rounded(op, dtype)
    pitch = pitch or -(-op.embed_dim // 8) * 8 + 8
    generator = torch.Generator().manual_seed(rows)
    values = (torch.randn(rows, op.embed_dim, generator=generator, dtype=torch.float64) + 3).to(dtype)
    storage = torch.full((GUARD + rows * pitch + GUARD,), math.nan, dtype=dtype)
    view = storage.as_strided((rows, op.embed_dim), (pitch, 1), GUARD)
    view.copy_(values)
    extent = (rows - 1) * pitch + op.embed_dim
    memory, plan = emulate(emulator, tmp_path, op, view, kernel=kernel, gpu=gpu, wide=pitch % 8 == 0, early=early)
    assert memory.numel() == extent
    after = torch.full_like(storage, math.nan)
    after[GUARD : GUARD + extent] = memory
    ours = after.as_strided(view.shape, view.stride(), GUARD).clone()

    assert_right(ours, op, values)
    if op.writes is not None:
        kept = [c for c in range(op.embed_dim) if c not in op.writes]
        assert same_bits(ours[:, kept].contiguous(), values[:, kept].contiguous())
    after.as_strided(view.shape, view.stride(), GUARD).copy_(values)
    assert same_bits(after, storage), "wrote between or beside the rows"
    return plan


SHAPES = {
    "snp_deit_tiny.block11": (153, 383),
    "snp_deit_small.block7": (307, 921),
    "snp_deit_small_1g3.block3": (345, 307),
    "savit_deit_base.block0": (483, 1276),
    "one_hidden_unit": (153, 1),
    "one_channel": (1, 5),
    "seventeen_by_sixteen": (17, 16),
    "a_multiple_of_everything": (128, 128),
    "one_more_than_everything": (129, 129),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_on_every_shape(emulator: Path, tmp_path: Path, shape: str, kernel: str) -> None:
    embed, hidden = SHAPES[shape]
    if kernel == "wgmma" and embed > 384:
        with pytest.raises(RuntimeError, match=r"'wgmma': .* E=483 .* needs E <= 512, N <= 384"):
            check(emulator, tmp_path, draw(embed, hidden), 35, kernel=kernel)
        return
    gpu = H100 if kernel == "split" else ONE_SM
    plan = check(emulator, tmp_path, draw(embed, hidden), 35, kernel=kernel, gpu=gpu)
    assert plan.startswith(kernel)
    if kernel == "split" and hidden > 64:
        assert "splits=1 " not in plan


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 31, 32, 33, 64, 65, 127, 129, 197])
def test_row_tails(emulator: Path, tmp_path: Path, kernel: str, rows: int) -> None:
    check(emulator, tmp_path, draw(37, 83), rows, kernel=kernel, gpu=H100 if kernel == "split" else ONE_SM)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("embed", "hidden"), [(153, 383), (345, 307)])
def test_copies_that_land_at_once(emulator: Path, tmp_path: Path, kernel: str, embed: int, hidden: int) -> None:
    """A tile must not be copied over before all have read it, whether the copy takes long or not."""
    gpu = Gpu(90, 3, 227 * 1024)  # a split has two chunks or more
    check(emulator, tmp_path, draw(embed, hidden), 35, kernel=kernel, gpu=gpu, early=True)


@pytest.mark.parametrize(
    ("kernel", "embed", "rows", "gpu", "instance"),
    [
        ("fused", 153, 140, ONE_SM, "mt=4 nu=3"),
        ("fused", 153, 70, TWO_SMS, "mt=2 nu=3"),
        ("fused", 307, 70, TWO_SMS, "mt=2 nu=6"),
        ("fused", 483, 70, TWO_SMS, "mt=2 nu=8"),
        ("fused", 153, 70, H100, "mt=1 nu=8"),
        ("split", 483, 40, H100, "mt=1 nu=8"),
        ("wgmma", 153, 140, H100, "nu=160"),
        ("wgmma", 192, 30, H100, "nu=192"),
        ("wgmma", 307, 30, H100, "nu=320"),
        ("wgmma", 345, 30, H100, "nu=352"),
        ("wgmma", 384, 70, H100, "nu=384"),
        ("wgmma_gemms", 37, 260, ONE_SM, "nu=64 "),
        ("wgmma_gemms", 100, 30, H100, "nu=128 splits=2"),
        ("wgmma_gemms", 153, 140, ONE_SM, "nu=160 splits=1"),
        ("wgmma_gemms", 345, 70, H100, "nu=176 splits=2"),
        ("wgmma_gemms", 384, 30, TWO_SMS, "nu=192 splits=1"),
        ("two_gemms", 307, 260, ONE_SM, "mt=4"),
        ("two_gemms", 307, 70, RTX_4090, "mt=2"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_instance(
    emulator: Path, tmp_path: Path, dtype: torch.dtype, kernel: str, embed: int, rows: int, gpu: Gpu, instance: str
) -> None:
    assert instance in check(emulator, tmp_path, draw(embed, 100), rows, dtype=dtype, kernel=kernel, gpu=gpu)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_activations(emulator: Path, tmp_path: Path, kernel: str, act: str) -> None:
    check(emulator, tmp_path, draw(48, 96, act=act), 33, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lists_of_channels_and_layer_scale(emulator: Path, tmp_path: Path, kernel: str) -> None:
    order = torch.randperm(153, generator=torch.Generator().manual_seed(0)).tolist()
    op = draw(153, 77, reads=tuple(order[:90]), writes=tuple(order[40:141]), gamma=True)
    check(emulator, tmp_path, op, 35, kernel=kernel, gpu=H100 if kernel == "split" else ONE_SM)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_that_no_wide_copy_can_read(emulator: Path, tmp_path: Path, kernel: str) -> None:
    check(emulator, tmp_path, draw(37, 70, biases=False), 35, kernel=kernel, pitch=37)


def test_two_gemms_have_no_limit_on_the_embedding(emulator: Path, tmp_path: Path) -> None:
    check(emulator, tmp_path, draw(1111, 130), 33, kernel=None)


def test_a_split_of_two_gemms(emulator: Path, tmp_path: Path) -> None:
    assert "splits=5" in check(emulator, tmp_path, draw(600, 600), 33, kernel="two_gemms", gpu=Gpu(90, 25, 99 * 1024))


@pytest.mark.parametrize("early", [False, True], ids=["late_copies", "early_copies"])
@pytest.mark.parametrize(
    ("embed", "hidden", "rows", "gpu", "plan"),
    [
        (483, 700, 300, ONE_SM, "nu=176 splits=1 blocks=1 chunks=2"),  # three row tiles, and rings that turn over
        (345, 307, 140, Gpu(90, 6, 227 * 1024), "nu=176 splits=3 blocks=3 chunks=2"),
        (768, 460, 33, H100, "nu=192 splits=8 blocks=8 chunks=1"),  # two weight tiles are all that fits beside x
    ],
)
def test_wgmma_gemms_take_turns(
    emulator: Path, tmp_path: Path, embed: int, hidden: int, rows: int, gpu: Gpu, plan: str, early: bool
) -> None:
    ran = check(emulator, tmp_path, draw(embed, hidden), rows, kernel="wgmma_gemms", gpu=gpu, early=early)
    assert plan in ran


def test_wgmma_gemms_leave_wider_rows_to_two_gemms(emulator: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"'wgmma_gemms': .* E=769 .* needs E <= 768 .* 'two_gemms' takes any E"):
        check(emulator, tmp_path, draw(769, 70), 3, kernel="wgmma_gemms")


@pytest.mark.parametrize("kernel", ["wgmma", "wgmma_gemms"])
def test_hoppers_kernels_name_the_gpu_that_they_need(emulator: Path, tmp_path: Path, kernel: str) -> None:
    with pytest.raises(RuntimeError, match=rf"'{kernel}': M=3 .* needs sm_90, the GPU is sm_89"):
        check(emulator, tmp_path, draw(37, 70), 3, kernel=kernel, gpu=RTX_4090)


def test_a_tile_of_one_narrow_row_follows(emulator: Path, tmp_path: Path) -> None:
    """Nothing of it can be fetched ahead: it has no sixteen bytes."""
    check(emulator, tmp_path, draw(7, 5), 129, kernel="wgmma", gpu=ONE_SM, pitch=8)
