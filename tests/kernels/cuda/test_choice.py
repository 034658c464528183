"""Which kernel a fused_mlp is bound to: what the environment asks for, else what was measured, else the table."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prunevit.runtime.work import kernel_of
from prunevit_kernels import ContractError, FusedMlp, tune
from prunevit_kernels._aot import stand_in_target
from prunevit_kernels._configs import CUDA_MLP_KERNELS, MLP_KERNELS
from prunevit_kernels._launch import TritonOp
from prunevit_kernels.fused_mlp import _cuda, _triton
from prunevit_kernels.fused_mlp._cuda import KERNEL_VARIABLE, CudaMlp
from prunevit_kernels.target import Target
from prunevit_kernels.tuning import Tuning
from tests.kernels.cuda.emulation import draw

KEY = "fused_mlp m64 n70 k37 20 37 bfloat16"
BY_RULE = "two_gemms"


def extension(takes: tuple[str, ...] = CUDA_MLP_KERNELS) -> Any:
    """Stands in for prunevit_kernels._cuda: plans what it is told, launches add one to x."""

    def plan(shape: object, device: object, kernel: str | None) -> object:
        kernel = kernel or BY_RULE
        if kernel not in takes:
            raise ValueError(f"fused_mlp kernel {kernel!r}: it does not fit")
        return SimpleNamespace(kernel=kernel, workspace_bytes=0, tile_rows=64)

    return SimpleNamespace(
        Shape=lambda *sizes: sizes,
        Device=SimpleNamespace(of=lambda index: index),
        Plan=plan,
        Weights=lambda **memory: memory,
        Mlp=lambda *given: SimpleNamespace(kernel=given[0].kernel, shape=given[1], launch=lambda stream: None),
    )


def packed(tuned: str | None = None, takes: tuple[str, ...] = CUDA_MLP_KERNELS, op: FusedMlp | None = None) -> CudaMlp:
    target = stand_in_target(torch.bfloat16)
    object.__setattr__(target, "tuning", None if tuned is None else Tuning("a GPU", kernels={KEY: tuned}))
    return CudaMlp(extension(takes), op or draw(37, 70, reads=tuple(range(20))), target)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.zeros(2, 20, 40, dtype=torch.bfloat16)[..., :37]


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KERNEL_VARIABLE, raising=False)


def bound_kernel(mlp: CudaMlp, x: torch.Tensor) -> str:
    return str(mlp.bind(x).args[0].kernel)  # type: ignore[attr-defined]


def test_unmeasured_the_extension_decides(x: torch.Tensor) -> None:
    assert bound_kernel(packed(), x) == BY_RULE
    assert packed().choice(x) == (None, "by rule: not measured here")


def test_a_measured_kernel_is_bound(x: torch.Tensor) -> None:
    assert bound_kernel(packed("wgmma"), x) == "wgmma"


def test_what_was_measured_for_other_sizes_is_not(x: torch.Tensor) -> None:
    assert bound_kernel(packed("wgmma", op=draw(37, 71)), x) == BY_RULE
    assert bound_kernel(packed("wgmma"), torch.zeros(2, 40, 40, dtype=torch.bfloat16)[..., :37]) == BY_RULE


def test_the_environment_wins(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL_VARIABLE, "split")
    assert bound_kernel(packed("wgmma"), x) == "split"
    monkeypatch.setenv(KERNEL_VARIABLE, "fast")
    with pytest.raises(ContractError, match=rf"a kernel in {KERNEL_VARIABLE} .*'wgmma_gemms', 'triton'.*, got fast"):
        packed("wgmma").bind(x)


def test_the_triton_pair_is_a_kernel_too(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = packed("triton")
    assert isinstance(mlp.serving(x), TritonOp)
    bound: list[torch.Tensor] = []
    monkeypatch.setattr(mlp.triton, "bind", lambda x: bound.append(x))
    mlp.bind(x)
    assert bound == [x]


def test_a_measured_kernel_that_this_build_lacks_is_named(x: torch.Tensor) -> None:
    with pytest.raises(ContractError, match=r"tuning.json .* tune anew: fused_mlp kernel 'wgmma': it does not fit"):
        packed("wgmma", takes=("fused",)).bind(x)


@pytest.mark.parametrize("biases", [True, False])
def test_the_triton_pair_is_made_of_the_packed_weights_alone(biases: bool) -> None:
    op = draw(37, 70, reads=tuple(range(20)), writes=tuple(range(5, 36)), gamma=biases, biases=biases)
    mlp = packed(op=op)
    assert {tensor.device.type for tensor in vars(mlp.op).values() if isinstance(tensor, torch.Tensor)} == {"meta"}
    direct = _triton.Packed(op, mlp.target)
    for made, wanted in ((mlp.triton.fc1, direct.fc1), (mlp.triton.fc2.linear, direct.fc2.linear)):
        for name, tensor in vars(wanted).items():
            if isinstance(tensor, torch.Tensor):
                assert torch.equal(getattr(made, name), tensor), name
    assert (mlp.triton.fc2.gamma is None) == (not biases)
    assert not biases or torch.equal(mlp.triton.fc2.gamma, direct.fc2.gamma)


def test_candidates_are_the_kernels_that_take_the_shape(x: torch.Tensor) -> None:
    assert packed(takes=("fused", "wgmma_gemms")).candidates(x) == ["fused", "wgmma_gemms", "triton"]


@pytest.mark.parametrize("overlaps", [False, True])
def test_weights_are_there_before_a_kernel_may_fetch_them_early(
    overlaps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that overlaps the one ahead of it reads weights at once: packing has to be over."""
    done: list[str] = []
    stream = SimpleNamespace(synchronize=lambda: done.append("synchronised"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(_cuda, "PackedWeights", lambda *_: done.append("packed"))
    target = stand_in_target(torch.bfloat16, overlaps)
    object.__setattr__(target, "device", torch.device("cuda", 0))
    CudaMlp(extension(), draw(37, 70), target)
    assert done == (["packed", "synchronised"] if overlaps else ["packed"])


@pytest.mark.parametrize("name", MLP_KERNELS)
def test_a_kernel_name_comes_back_from_a_file(name: str, tmp_path: Path) -> None:
    Tuning("a GPU", kernels={KEY: name}).write(tmp_path / "tuning.json")
    assert Tuning.read(tmp_path / "tuning.json", "a GPU").kernels == {KEY: name}


@pytest.mark.parametrize(
    "value", ['"wgmma"', '{"kernel": "fast"}', '{"kernel": ["wgmma"]}', '{"kernel": "wgmma", "mt": 4}']
)
def test_a_file_that_names_no_kernel_is_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text('{"format": 1, "machines": {"a GPU": {"' + KEY + '": ' + value + "}}}")
    with pytest.raises(ContractError, match=r"expected a kernel for .fused_mlp m64"):
        Tuning.read(path, "a GPU")


def test_the_fastest_kernel_is_chosen_from_equal_starts(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, lines, target = packed(takes=("fused", "split", "wgmma")), list[str](), Target("torch")
    times = {"fused": 3e-6, "split": 2e-6, "wgmma": 4e-6, "triton": 5e-6}

    def bind_with(buffer: torch.Tensor, kernel: str) -> str:
        assert not buffer.any(), "the candidates before have added to x"
        buffer += 1
        return kernel

    monkeypatch.setattr(mlp, "bind_with", bind_with)
    monkeypatch.setattr(tune, "measure", times.__getitem__)
    monkeypatch.setattr(tune, "machine_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    object.__setattr__(target, "dtype", torch.bfloat16)
    found = tune.choose_kernels([(mlp, x), (mlp, x)], target, lines.append)
    assert found.kernels == {KEY: "split"}
    assert lines == [f"{KEY}: split 2.0 µs, fused 3.0 µs, wgmma 4.0 µs, triton 5.0 µs"]
    assert not x.any()


def test_explain_says_which_kernel_and_why(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, target = packed("wgmma"), packed().target
    kernel, macs = kernel_of(mlp.op, mlp, [x], target)
    assert kernel == ("CUDA C++ wgmma, 64 rows", "bfloat16; measured fastest here")
    assert macs == 64 * (128 * 64 + 48 * 128)
    monkeypatch.setenv(KERNEL_VARIABLE, "triton")
    kernel, macs = kernel_of(mlp.op, mlp, [x], target)
    assert kernel.name.startswith("Triton ")
    assert kernel.why == f"bfloat16; {KERNEL_VARIABLE} asks for it"
    assert macs
