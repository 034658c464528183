"""What the built extension refuses, and by which words, where no GPU is needed to ask."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from types import ModuleType, SimpleNamespace

import pybind11
import pytest
import torch

import setup_cuda
from prunevit_kernels import FusedMlp, Target
from prunevit_kernels._aot import stand_in_target
from prunevit_kernels.fused_mlp import _cuda, _triton
from tests.kernels.cuda.emulation import draw


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The extension, linked from the objects of the current sources."""
    if setup_cuda.find_nvcc() is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: the extension cannot be built")
    path = tmp_path_factory.mktemp("extension") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    setup_cuda.build(path, [pybind11.get_include(), sysconfig.get_paths()["include"]])
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mlp(native: ModuleType, **changed: object) -> object:
    """An Mlp of E = 153, F = 383 on addresses that are never read, with some arguments changed."""
    shape = native.Shape(197, 153, 153, 383, 153)
    plan = native.Plan(shape, native.Device(90, 132, 232448), changed.pop("kernel", "two_gemms"))
    sizes = {"w1": 6 * 3 * 8192, "w2": 6 * 160 * 128, "b1": 6 * 64 * 4, "b2": 640, "gamma": 640}
    memory: dict[str, object] = {name: (4096, size) for name, size in sizes.items()} | {"reads": None, "writes": None}
    memory |= {name: changed.pop(name) for name in list(changed) if name in memory}
    given = {
        "dtype": "bfloat16",
        "act": "gelu",
        "eps": 1e-6,
        "x": (4096, 160),
        "workspace": (4096, 1 << 24),
        "device": 0,
        "overlaps": False,
    }
    return native.Mlp(plan=plan, shape=shape, weights=native.Weights(**memory), **(given | changed))


REFUSALS = {
    "an_unknown_dtype": ({"dtype": "float32"}, "a dtype .float16, bfloat16., got 'float32'"),
    "an_unknown_activation": ({"act": "silu"}, "an activation .gelu, .*relu., got 'silu'"),
    "an_unknown_kernel": ({"kernel": "fast"}, "a kernel .fused, split, two_gemms, wgmma, wgmma_gemms., got 'fast'"),
    "rows_that_overlap": ({"x": (4096, 152)}, "rows of x at least E apart, got a pitch of 152"),
    "no_address": ({"x": (0, 160)}, "x on whole elements, got 0"),
    "weights_of_another_shape": ({"w1": (4096, 8192)}, "packed fc1 weights of 147456 bytes, got 8192"),
    "weights_off_their_alignment": ({"w2": (4100, 1 << 20)}, "packed fc2 weights at a multiple of 16, got 4100"),
    "a_short_bias": ({"b1": (4096, 383 * 4)}, "fc1's bias of 1536 bytes, got 1532"),
    "no_workspace": ({"workspace": None}, "a workspace of .* bytes, got 0"),
    "a_negative_epsilon": ({"eps": -1.0}, "eps >= 0, got -1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_cuda_call(native: ModuleType, case: str) -> None:
    changed, words = REFUSALS[case]
    with pytest.raises(ValueError, match=words):
        mlp(native, **changed)


def test_a_failed_cuda_call_names_kernel_shape_and_call(native: ModuleType) -> None:
    device = torch.cuda.device_count()  # one past the last
    with pytest.raises(RuntimeError, match=r"'two_gemms', M=197 E=153 K=153 F=383 N=153: cuda\w+ failed: cudaError"):
        mlp(native, device=device)


@pytest.mark.parametrize("sizes", [(0, 153, 153, 383, 153), (1, 153, 154, 383, 153), (1, 153, 153, 0, 153)])
def test_impossible_shapes_are_refused(native: ModuleType, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"fused_mlp expected .*, got M="):
        native.Shape(*sizes)


def test_a_forced_kernel_that_does_not_fit_says_why(native: ModuleType) -> None:
    shape = native.Shape(197, 768, 768, 3072, 768)
    with pytest.raises(ValueError, match=r"'fused': M=197 E=768 .* needs E <= 512, N <= 512"):
        native.Plan(shape, native.Device(90, 132, 232448), "fused")


def test_wgmma_gemms_workspace_holds_whole_tiles_and_every_split(native: ModuleType) -> None:
    plan = native.Plan(native.Shape(197, 345, 345, 1075, 345), native.Device(90, 132, 232448), "wgmma_gemms")
    assert (plan.kernel, plan.splits, plan.tile_rows) == ("wgmma_gemms", 17, 256)
    assert plan.workspace_bytes == -(-17 * 197 * 352 * 4 // 256) * 256 + 2 * 17 * 128 * 64 * 2
    with pytest.raises(ValueError, match=r"a workspace of .* bytes, got 0"):
        mlp(native, kernel="wgmma_gemms", workspace=None)


def test_the_choice_is_in_the_open(native: ModuleType) -> None:
    h100 = native.Device(90, 132, 232448)
    chosen = {
        (m, e, f): native.Plan(native.Shape(m, e, e, f, e), h100).kernel
        for m, e, f in [(197, 153, 383), (50432, 153, 383), (50432, 345, 307), (197, 345, 307), (50432, 768, 3072)]
    }
    assert list(chosen.values()) == ["split", "fused", "fused", "split", "two_gemms"]


def _too_new_for_the_driver(index: int) -> None:
    raise RuntimeError("cudaDeviceGetAttribute failed on GPU 0: CUDA driver version is insufficient")


UNUSABLE = SimpleNamespace(Device=SimpleNamespace(of=_too_new_for_the_driver))


@pytest.mark.parametrize(("module", "why"), [(None, "is not built"), (UNUSABLE, "does not run here .*insufficient")])
def test_without_the_extension_triton_serves_and_says_how_to_build(
    module: object, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prunevit_kernels._cuda", module)
    served: list[FusedMlp] = []
    monkeypatch.setattr(_triton, "Packed", lambda op, target: served.append(op))
    op, target = draw(37, 70), Target("cuda", torch.device("cuda"), torch.bfloat16)
    with pytest.warns(UserWarning, match=rf"_cuda {why}.*setup\.py build_ext --inplace"):
        _cuda.pack(op, target)
    assert served == [op]


def test_kernels_for_an_absent_gpu_are_tritons() -> None:
    assert isinstance(draw(37, 70).pack(stand_in_target(torch.float16)), _triton.Packed)
