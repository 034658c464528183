"""fused_mlp's CUDA kernels on a GPU: every published width and drawn ones, every kernel, in guard bands and graphs."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from prunevit_kernels import FusedMlp, Target
from prunevit_kernels._configs import CUDA_MLP_KERNELS as KERNELS
from prunevit_kernels.fused_mlp._cuda import KERNEL_VARIABLE, CudaMlp
from tests.kernels.cuda.emulation import draw
from tests.kernels.cuda.rules import assert_right
from tests.kernels.half_precision import changed, rounded, same_bits
from tests.sanitizer import finds_nothing

pytestmark = pytest.mark.gpu

PUBLISHED = {
    153: (383, 460, 537, 614),
    307: (307, 921, 1075, 1228),
    345: (307, 1075, 1382),
    384: (77, 256, 333, 512, 640, 811, 983, 1024, 1152, 1201, 1344, 1390, 1536),
    483: (1067, 1151, 1276, 1778, 2373, 2610, 2817, 2820, 2843, 2869, 2892, 2927),
}
SHAPES = [(embed, hidden) for embed, widths in PUBLISHED.items() for hidden in widths]
HOPPERS = ("wgmma", "wgmma_gemms")
GUARD = 64


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def target(request: pytest.FixtureRequest) -> Target:
    assert torch.cuda.is_available(), "tests marked gpu need an NVIDIA GPU that PyTorch sees"
    return Target("cuda", torch.device("cuda", torch.cuda.current_device()), request.param)


@functools.lru_cache(maxsize=4)
def on_gpu(embed: int, hidden: int, dtype: torch.dtype) -> FusedMlp:
    op: FusedMlp = changed(rounded(draw(embed, hidden), dtype), Tensor.cuda)
    return op


def place(target: Target, rows: int, embed: int, pitch: int) -> tuple[Tensor, Tensor]:
    """x [1, rows, embed] of mean 3 between guard bands of NaN, and the storage around it."""
    storage = torch.full((GUARD + rows * pitch + GUARD,), math.nan, dtype=target.dtype, device=target.device)
    x = storage.as_strided((1, rows, embed), (rows * pitch, pitch, 1), GUARD)
    generator = torch.Generator(target.device).manual_seed(rows)
    x.copy_(torch.randn(x.shape, generator=generator, device=target.device) + 3)
    return x, storage


def check(
    op: FusedMlp, target: Target, rows: int, *, pitch: int = 0, run: Callable[[Callable[[], None]], None] | None = None
) -> None:
    pitch = pitch or target.pitch(op.embed_dim) + 8
    x, storage = place(target, rows, op.embed_dim, pitch)
    before = storage.clone()
    packed = op.pack(target)
    assert isinstance(packed, CudaMlp), "the extension does not run here: Triton would pass in its place"
    launch = packed.bind(x)
    assert same_bits(storage, before), "bind wrote to x"
    launch() if run is None else run(launch)
    torch.cuda.synchronize()
    values = before.as_strided(x.shape, x.stride(), GUARD)
    assert_right(x.clone(), op, values.clone())
    x.copy_(values)
    assert same_bits(storage, before), "wrote between or beside the rows"


def fits(kernel: str, op: FusedMlp, target: Target) -> bool:
    """Whether the kernel that the environment asks for takes this op here; if not, it says so by name."""
    x = torch.zeros(1, 32, target.pitch(op.embed_dim), dtype=target.dtype, device=target.device)[..., : op.embed_dim]
    try:
        op.pack(target).bind(x)
    except ValueError as refusal:
        if "fused_mlp kernel 'fused'" in str(refusal) or f"fused_mlp kernel '{kernel}'" in str(refusal):
            return False
        raise
    return True


@pytest.mark.parametrize("rows", [197, 6304])
@pytest.mark.parametrize(("embed", "hidden"), SHAPES)
def test_published_widths_as_chosen(embed: int, hidden: int, rows: int, target: Target) -> None:
    check(on_gpu(embed, hidden, target.dtype), target, rows)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("embed", "hidden"), SHAPES)
def test_published_widths_by_every_kernel(
    embed: int, hidden: int, kernel: str, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = on_gpu(embed, hidden, target.dtype)
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    if fits(kernel, op, target):
        check(op, target, 394)
    else:
        hopper = torch.cuda.get_device_capability() == (9, 0)
        assert not hopper or (embed > 384 and kernel == "wgmma"), "an H100 has room for this"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rows", [1, 2, 31, 33, 63, 64, 65, 127, 129, 1000, 50432, 60000])
def test_any_number_of_rows(rows: int, kernel: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    op = on_gpu(153, 383, target.dtype)
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    if fits(kernel, op, target):
        check(op, target, rows)
    else:
        assert kernel in HOPPERS
        assert torch.cuda.get_device_capability() != (9, 0)


@pytest.mark.parametrize("seed", range(300))
def test_drawn_shapes(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths, rows, activation, lists of channels, layer-scale, pitch and kernel drawn together."""
    drawn = random.Random(seed)
    dtype = drawn.choice([torch.bfloat16, torch.float16])
    target = Target("cuda", torch.device("cuda", torch.cuda.current_device()), dtype)
    embed, hidden = drawn.randint(1, drawn.choice([40, 400, 900])), drawn.randint(1, drawn.choice([40, 400, 3000]))
    lists = [tuple(drawn.sample(range(embed), drawn.randint(1, embed))) if drawn.random() < 0.3 else None for _ in "rw"]
    act = drawn.choice(["gelu", "gelu_tanh", "quick_gelu", "relu"])
    op = draw(embed, hidden, act=act, reads=lists[0], writes=lists[1], gamma=drawn.random() < 0.5, seed=seed)
    op = changed(rounded(op, dtype), Tensor.cuda)
    kernel = drawn.choice([*KERNELS, None])
    if kernel is not None:
        monkeypatch.setenv(KERNEL_VARIABLE, kernel)
        if not fits(kernel, op, target):
            monkeypatch.delenv(KERNEL_VARIABLE)
    check(op, target, drawn.randint(1, 3000), pitch=drawn.choice([0, embed, embed + 3]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_captured_and_replayed(kernel: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture without a warm-up holds the launches; a replay computes what a launch does, bit for bit."""
    op = on_gpu(153, 383, target.dtype)
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    if not fits(kernel, op, target):
        assert kernel in HOPPERS
        return

    def replay(launch: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        graph.replay()

    check(op, target, 197, run=replay)
    results = []
    for _ in range(2):
        x, _ = place(target, 197, 153, 160)
        launch = op.pack(target).bind(x)
        launch() if not results else replay(launch)
        torch.cuda.synchronize()
        results.append(x.clone())
    assert same_bits(*results)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_same_twice(kernel: str, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of splits are added in order: no launch differs from another in one bit."""
    op = on_gpu(307, 921, target.dtype)
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    if not fits(kernel, op, target):
        assert torch.cuda.get_device_capability() != (9, 0)
        return
    results = []
    for _ in range(20):
        x, _ = place(target, 1576, 307, 320)
        op.pack(target).bind(x)()
        results.append(x.clone())
    assert all(same_bits(results[0], other) for other in results[1:])


def test_not_a_number_stays_in_its_row(target: Target) -> None:
    op = on_gpu(153, 383, target.dtype)
    x, _ = place(target, 197, 153, 160)
    x[0, 5, 7] = math.nan
    op.pack(target).bind(x)()
    broken = x.isnan().any(-1)[0].nonzero().flatten().tolist()
    assert broken == [5]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    """Each kernel on one small shape."""
    finds_nothing(tool, ["prunevit"], f"{__file__}::test_any_number_of_rows", "-k", "bf16 and (33 or 129)")
