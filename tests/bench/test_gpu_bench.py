"""``make gpu`` as far as it goes without a GPU, and what its benchmarks compute from times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunevit import PrunedViT, shapes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import _gpu  # noqa: E402
import _works  # noqa: E402
import gpu  # noqa: E402

from prunevit.benchmark import Peer  # noqa: E402


def make(*variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_dry_run_prints_the_build_and_the_part(part: str, tmp_path: Path) -> None:
    (tmp_path / "pydantic-2-py3-none-any.whl").touch()
    done = make(f"PART={part}", "SHAPES=snp_deit_tiny", "DRY_RUN=1", f"WHEELS={tmp_path}", f"OUT={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    install, build, run, *_ = done.stdout.splitlines()
    assert "--no-index --no-deps" in install
    assert install.endswith("pydantic-2-py3-none-any.whl")
    assert "setup.py -q build_ext --inplace" in build
    assert ("-m gpu" if part == "tests" else f"bench/{part}.py --device=cuda") in run
    assert "snp_deit_tiny" in run
    assert not (tmp_path / "out").exists()


def test_an_unknown_part_is_named() -> None:
    done = make("PART=everything")
    assert done.returncode != 0
    assert "invalid choice: 'everything'" in done.stderr


def test_a_folder_without_wheels_is_named(tmp_path: Path) -> None:
    done = make("PART=model", f"WHEELS={tmp_path}")
    assert f"expected a folder of wheels in WHEELS, got {tmp_path}" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the part would run")
def test_without_a_gpu_it_says_so_and_builds_nothing(tmp_path: Path) -> None:
    done = make("PART=model", f"OUT={tmp_path}/out")
    assert "expected an NVIDIA GPU that PyTorch sees, got none" in done.stderr
    assert "setup.py" not in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "NEEDS", ("json", "a_package_of_nobody", "brought_along"))
    (tmp_path / "brought_along").mkdir()
    assert gpu.missing(str(tmp_path)) == ["a_package_of_nobody"]


@pytest.mark.parametrize("capability", [((9, 0), "90a"), ((8, 0), "80"), ((8, 9), "89"), ((10, 0), "100")])
def test_one_architecture_is_built(capability: tuple[tuple[int, int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability[0])
    assert gpu.architecture() == capability[1]


@pytest.mark.parametrize("name", shapes.names())
@pytest.mark.parametrize("grouped", [False, True], ids=["one_width", "each_its_own"])
def test_peers_get_every_width_in_eights(name: str, grouped: bool) -> None:
    spec, padded = shapes.get(name), _works.padded_spec(shapes.get(name), grouped=grouped)
    assert padded.embed_dim % 8 == 0
    for block, wide in zip(spec.blocks, padded.blocks, strict=True):
        assert wide.qk_dims == wide.v_dims
        assert all(w % 8 == 0 and w - max(qk, v) >= 0 for w, qk, v in zip(wide.qk_dims, block.qk_dims, block.v_dims))
        assert grouped or len(set(wide.qk_dims)) <= 1
        assert 0 <= wide.mlp_dim - block.mlp_dim < 8


def test_a_padded_model_runs() -> None:
    spec = _works.padded_spec(shapes.get("snp_deit_tiny"), grouped=False)
    small = spec.model_copy(update={"img_size": (32, 32), "blocks": spec.blocks[:2]})
    with torch.no_grad():
        assert PrunedViT(small).eval()(torch.randn(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("op", ["ragged_attention", "norm_linear", "fused_mlp"])
def test_no_block_is_timed_twice(op: str) -> None:
    works = _works.blocks_of(op, "snp_deit_small_1g3", [1, 256])
    assert len({(work["batch"], _works.cost(op, work)) for work in works}) == len(works)
    assert {work["batch"] for work in works} == {1, 256}


def test_the_floor_is_the_slowest_resource_of_each_step() -> None:
    peaks = {"flops": 10.0, "bandwidth": 5.0, "exps": 2.0}
    assert _works.floor_ms([(10, 1, 0), (10, 10, 0), (0, 0, 6)], peaks) == pytest.approx(1e3 * (1 + 2 + 3))


def peer(name: str, ms: float, **facts: object) -> Peer:
    return Peer(name, {}, samples=[[ms], [ms], [ms]], facts=dict(facts))


def test_rows_have_ratios_floors_and_goals(tmp_path: Path) -> None:
    works = [{"name": "snp_deit_tiny", "batch": 256}]
    peers = [peer("prunevit", 2.0, costs=[[(1e12, 0, 0)]]), peer("eager", 9.0), peer("compile max-autotune", 4.0)]
    rows = _gpu.rows_of("model", works, [*peers, peer("dense eager", 12.0)], {"flops": 1e15, "bandwidth": 1, "exps": 1})
    ours = rows[0]
    assert (ours["best_peer"], ours["ratio_to_best_peer"], ours["goal_ratio"]) == ("compile max-autotune", 2.0, 1.5)
    assert (ours["fraction_of_floor"], ours["goal_fraction_of_floor"], ours["tflops"]) == (0.5, 0.55, 500.0)
    assert ours["pruned_over_dense"] == 6.0
    assert _gpu.table_of(rows).row_count == 1
    for _ in range(2):  # a second run replaces its own rows
        _gpu.write("model", {"environment": {"gpu": "NVIDIA H100 80GB"}, "rows": rows}, tmp_path)
    written = json.loads((tmp_path / "model-nvidia-h100-80gb.json").read_text())
    assert len(written["rows"]) == 4
    assert (tmp_path / "model-nvidia-h100-80gb.csv").read_text().count("\n") == 5
    assert (tmp_path / "model-nvidia-h100-80gb.png").stat().st_size > 1000


@pytest.mark.parametrize("script", ["model", "ragged_attention", "norm_linear", "fused_mlp"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be timed")
def test_a_benchmark_says_that_it_needs_a_gpu(script: str) -> None:
    command = [sys.executable, f"bench/{script}.py", "--device", "cuda", "--shapes", "snp_deit_tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected an NVIDIA GPU that PyTorch sees, got none" in done.stderr
