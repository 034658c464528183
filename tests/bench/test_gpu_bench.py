"""``make gpu`` as far as it goes without a GPU, and what its benchmarks compute from times."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

from prunevit import PrunedViT, shapes

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import _gpu  # noqa: E402
import _gpu_worker  # noqa: E402
import _works  # noqa: E402
import gpu  # noqa: E402
import mlp_rules  # noqa: E402

from prunevit.benchmark import Peer, PeerFailed  # noqa: E402


def make(*variables: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", *variables]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_dry_run_prints_the_build_and_the_part(part: str, tmp_path: Path) -> None:
    (tmp_path / "pydantic-2-py3-none-any.whl").touch()
    done = make(f"PART={part}", "SHAPES=snp_deit_tiny", "DRY_RUN=1", f"WHEELS={tmp_path}", f"OUT={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    install, build, loads, run, *_ = done.stdout.splitlines()
    assert "--no-index --no-deps" in install
    assert install.endswith("pydantic-2-py3-none-any.whl")
    assert "setup.py -q build_ext --inplace" in build
    assert "_cuda.Device.of(0)" in loads
    what = {"tests": "-m gpu", "tune": f"-m prunevit.runtime.tune --batch=1,64,256 --out={tmp_path}/out/tuning.json"}
    assert what.get(part, f"bench/{part}.py --device=cuda") in run
    assert "snp_deit_tiny" in run
    assert not (tmp_path / "out").exists()


def test_a_part_takes_the_time_it_is_given_and_a_build_that_was_brought_along() -> None:
    done = make("PART=fused_mlp", "DRY_RUN=1", "BUILT=1", "SECONDS=30")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert "--limit={left}" in done.stdout.replace("'", "")


def test_nothing_lives_on_when_the_time_is_over(tmp_path: Path) -> None:
    """Neither the command nor what it has started, stopped or not."""
    child = f"import os, time; open(r'{tmp_path}/pid', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu.run([sys.executable, "-c", parent], {}, time.monotonic() + 2) == 124
    left = Path("/proc") / (tmp_path / "pid").read_text()
    until = time.monotonic() + 5
    while left.exists() and "Z" not in (left / "stat").read_text().split()[2]:
        assert time.monotonic() < until


def test_what_was_tuned_before_is_timed(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text("{}")
    tuned = f"--tuning={tmp_path}/tuning.json"
    done = make("PART=model", "DRY_RUN=1", f"OUT={tmp_path}")
    assert [tuned in line for line in done.stdout.splitlines()] == [False, False, True, True]
    done = make("PART=fused_mlp", "DRY_RUN=1", "BUILT=1", f"OUT={tmp_path}", "IMPLS=prunevit,eager")
    assert tuned in done.stdout
    assert "--impls=prunevit,eager" in done.stdout


def test_a_table_of_another_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuning.json").write_text('{"format": 1, "machines": {"an A100": {}}}')
    monkeypatch.setattr(_gpu, "machine_name", lambda: "an H100")
    with pytest.raises(SystemExit, match=r"tuning\.json to be tuned on an H100, got an A100"):
        _gpu.bench("model", ["snp_deit_tiny"], [1], None, limit=1, tuning=tmp_path / "tuning.json")


def test_every_test_of_a_gpu_is_run() -> None:
    """The stand-in's own, which are for no GPU, apart."""
    mark, run = re.compile(r"^(pytestmark = \[?|@)pytest\.mark\.gpu", re.M), (*gpu.GPU_TESTS, *gpu.TIMED_TESTS)
    files = (ROOT / "tests").rglob("test_*.py")
    marked = {path.relative_to(ROOT) for path in files if mark.search(path.read_text())}
    assert {Path(path) for path in run} <= {*marked, Path("tests/kernels/gpu")}
    assert all(any(path.is_relative_to(one) for one in run) for path in marked), marked


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["in_front", "in_the_background"])
def interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """A shell has its background jobs ignore interrupts, and so do their children unless told otherwise."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_last_words_are_waited_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytest, interrupted when the time is over, says what has failed."""
    begun = tmp_path / "begun"
    second = f"import pathlib, time\n    pathlib.Path({str(begun)!r}).touch()\n    time.sleep(60)"
    (tmp_path / "test_it.py").write_text(f"def test_a(): assert 1 == 2\ndef test_b():\n    {second}\n")

    class OutOfTime(subprocess.Popen[bytes]):
        """The time is over in the second test, however long it took to come there."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout is None or begun.exists():
                return super().wait(timeout)
            while not begun.exists():
                assert self.poll() is None
                time.sleep(0.05)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", OutOfTime)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    assert gpu.run(command, {}, time.monotonic() + 200) == 124
    assert "assert 1 == 2" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("statuses", "status"), [((0, 0), 0), ((1, 0), 1), ((0, 5), 0), ((5, 1), 1), ((124, 5), 124), ((5, 5), 5)]
)
def test_failing_tests_keep_no_others_from_running(
    statuses: tuple[int, int], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [0, *statuses]  # the extensions load
    monkeypatch.setattr(gpu, "run", lambda *_: left.pop(0))
    monkeypatch.setattr(gpu, "architecture", lambda: "90a")
    assert gpu.main(["--part=tests", "--built", f"--out={tmp_path}"]) == status
    assert left == []


def test_extensions_that_do_not_load_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], extra: dict[str, str], until: float) -> int:
        ran.append(command)
        return int(command == gpu.LOADS and len(ran) == 1)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "architecture", lambda: "90a")
    assert gpu.main(["--part=fused_mlp", "--built", f"--out={tmp_path}"]) == 0
    assert [command == gpu.LOADS for command in ran] == [True, False, True, False]
    assert "build_ext" in ran[1]


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
    works = _works.blocks_of(op, ["snp_deit_small_1g3", "savit_deit_base"], [1, 256])
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
    without = _gpu.rows_of("model", works, peers[:2], {"flops": 1e15, "bandwidth": 1, "exps": 1})
    assert without[0]["goal_ratio"] is None, "the goal is about torch.compile, which was not measured"
    for _ in range(2):  # a second run replaces its own rows
        _gpu.write("model", {"environment": {"gpu": "NVIDIA H100 80GB"}, "rows": rows}, tmp_path)
    written = json.loads((tmp_path / "model-nvidia-h100-80gb.json").read_text())
    assert len(written["rows"]) == 4
    assert (tmp_path / "model-nvidia-h100-80gb.csv").read_text().count("\n") == 5
    assert (tmp_path / "model-nvidia-h100-80gb.png").stat().st_size > 1000


def test_reasons_of_an_earlier_run_go_with_its_rows(tmp_path: Path) -> None:
    peers = [peer("prunevit", 2.0, costs=[[(1e12, 0, 0)]]), peer("eager", 9.0)]
    peaks = {"flops": 1e15, "bandwidth": 1e12, "exps": 1e12}
    for name, failed in (("snp_deit_tiny", "late"), ("snp_deit_small", "late"), ("snp_deit_tiny", "")):
        rows = _gpu.rows_of("model", [{"name": name, "batch": 1}], peers, peaks)
        reasons = {name: {"compile max-autotune": failed}} if failed else {}
        _gpu.write("model", {"environment": {"gpu": "a GPU"}, "failed": reasons, "rows": rows}, tmp_path)
    written = json.loads((tmp_path / "model-a-gpu.json").read_text())
    assert written["failed"] == {"snp_deit_small": {"compile max-autotune": "late"}}
    assert {row["shape"] for row in written["rows"]} == {"snp_deit_tiny", "snp_deit_small"}


def test_what_overlapping_gains_is_found_within_rounds() -> None:
    works = [{"name": "snp_deit_tiny", "batch": 1}]
    ours, early = peer("prunevit", 1.0, costs=[[(1e12, 0, 0)]]), peer(_works.OVERLAPPING, 1.0, costs=[[(1e12, 0, 0)]])
    ours.samples, early.samples = [[2.0], [6.0], [2.2]], [[1.0], [3.0], [1.1]]
    rows = _gpu.rows_of("model", works, [ours, early], {"flops": 1e15, "bandwidth": 1, "exps": 1})
    assert _gpu.overlap_of(rows) == ["snp_deit_tiny, batch 1: 2.00 times as fast with overlapping launches"]


def mlp_peers(**us: list[float | None]) -> list[Peer]:
    """Peers of two works, each with its time in every one, and the kernel that ran it."""
    made = []
    for name, times in us.items():
        label = {"prunevit": "prunevit", "eager": "eager"}.get(name, f"prunevit:{name}")
        ms = [None if time is None else time / 1e3 for time in times]
        kernel = "fused" if name == "prunevit" else name
        made.append(Peer(label, {}, samples=[ms] * 3, facts={"kernels": [kernel] * len(times)}))  # type: ignore[list-item]
    return made


def test_every_kernel_of_ours_has_a_row_and_is_no_peer() -> None:
    works = [
        {"name": "snp_deit_tiny", "block": i, "batch": 1, "e": 153, "f": f, "qk": [], "v": []}
        for i, f in enumerate((383, 614))
    ]
    peers = mlp_peers(prunevit=[10, 20], fused=[10, 20], wgmma=[7, None], wgmma_gemms=[9, 15], eager=[30, 40])
    rows = _gpu.rows_of("fused_mlp", works, peers, {"flops": 1e15, "bandwidth": 1e12, "exps": 1e12})
    assert [row["impl"] for row in rows].count("prunevit:wgmma") == 1, "a kernel that does not take a shape has no row"
    assert {row["kernel"] for row in rows if row["impl"] == "prunevit"} == {"fused"}
    ours = [row for row in rows if row["impl"] == "prunevit"]
    assert [row["best_peer"] for row in ours] == ["eager", "eager"]
    assert [(row["fastest"], row["fastest_to_best_peer"]) for row in ours] == [
        ("prunevit:wgmma", pytest.approx(30 / 7, 1e-3)), ("prunevit:wgmma_gemms", pytest.approx(40 / 15, 1e-3)),
    ]  # fmt: skip
    table = _gpu.kernels_of(rows)
    cells = [list(column.cells) for column in table.columns]
    assert cells[4:] == [["10.0", "20.0"], ["–", "–"], ["–", "–"], ["7.0*", "–"], ["9.0", "15.0*"], ["–", "–"],
                         ["fused", "fused"], ["1.43", "1.33"]]  # fmt: skip
    assert {(p.embed, p.hidden): p.times for p in mlp_rules.points_of(rows)} == {
        (153, 383): {"fused": 10.0, "wgmma": 7.0, "wgmma_gemms": 9.0},
        (153, 614): {"fused": 20.0, "wgmma_gemms": 15.0},
    }


def drawn_points(seed: int) -> list[mlp_rules.Point]:
    g = torch.Generator().manual_seed(seed)
    names = ("fused", "split", "two_gemms", "wgmma_gemms")
    return [
        mlp_rules.Point(rows, embed, hidden, {name: 1 + torch.rand((), generator=g).item() for name in names})
        for rows in (197, 12608, 50432)
        for embed in (153, 345, 384)
        for hidden in (77, 307, 1024, 1536)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_rules_choose_the_fastest_kernel_of_every_problem(seed: int) -> None:
    points = drawn_points(seed)
    rules = mlp_rules.rules_of(points, 132, tie=0.0)
    assert all(point.loss(mlp_rules.chosen(rules, point, 132) or "") == 1 for point in points)
    rules = mlp_rules.rules_of(points, 132, tie=0.3)
    assert all(point.loss(mlp_rules.chosen(rules, point, 132) or "") <= 1.3 for point in points)
    assert len(rules) < len(points) / 2


def test_rules_are_printed_as_plan_h_has_them() -> None:
    times = {"split": [5, 9, 30, 60], "wgmma": [6, 9, 20, 50], "wgmma_gemms": [9, 9, 40, 40]}
    sizes = [(1, 77), (1, 1536), (256, 307), (256, 1536)]
    rows = [
        {"op": "fused_mlp", "impl": f"prunevit:{name}", "kernel": name, "batch": b, "e": 384, "f": f, "us_p50": us[i]}
        for name, us in times.items()
        for i, (b, f) in enumerate(sizes)
    ]
    facts = {"gpu": "a GPU", "dtype": "bfloat16", "commit": "abc", "sm": 90, "multiprocessors": 132}
    assert mlp_rules.report({"environment": facts, "rows": rows}, 0.03) == [
        "    // a GPU, bfloat16, commit abc: 4 problems measured",
        "    {90, 90, 0.425f, 384, kAny, Kernel::split},",
        "    {90, 90, kAny, 384, 1.79f, Kernel::wgmma},",
        "    {90, 90, kAny, 384, kAny, Kernel::wgmma_gemms},",
        "// at worst 1.00 times the best kernel's time",
    ]
    with pytest.raises(SystemExit, match="expected rows of prunevit:fused"):
        mlp_rules.report({"environment": facts, "rows": []}, 0.03)


def test_what_ours_fails_of_does_not_end_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(kind: str, works: list[_works.Work], *_: object, **__: object) -> object:
        if works[0]["batch"] == 1:
            raise PeerFailed("prunevit: no answer within 1 s")
        peers = [peer("prunevit", 2.0, costs=[[(1e12, 0, 0)]]), peer("eager", 9.0)]
        return _gpu.rows_of(kind, works, peers, {"flops": 1e15, "bandwidth": 1e12, "exps": 1e12}), {}

    monkeypatch.setattr(_gpu, "measure", measure)
    with pytest.raises(SystemExit, match="prunevit failed"):
        _gpu.bench("model", ["snp_deit_tiny"], [1, 8], tmp_path, limit=1e3, device="cpu")
    (written,) = tmp_path.glob("*.json")
    record = json.loads(written.read_text())
    assert {row["batch"] for row in record["rows"]} == {8}
    assert record["failed"] == {"snp_deit_tiny": {"prunevit": "prunevit: no answer within 1 s"}}


def test_a_build_that_hangs_holds_nobody_up() -> None:
    """It ends, says so, and gives the lock back."""
    code = "import _gpu_worker as w, time\nwith w.alone({'most': 0.3, 'turn': 0}): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (3, "TimeoutError: not built in 0 s")


def test_a_build_that_fails_says_so_at_once() -> None:
    code = "import _gpu_worker as w\nwith w.alone({'most': 60, 'turn': 0}): raise ValueError('why')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "bench", capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, "ValueError: why")


def test_a_captured_op_keeps_its_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses alone."""
    monkeypatch.setattr(torch, "cuda", MagicMock())
    buffer = torch.zeros(3)
    replay, alive = _gpu_worker.captured(lambda buffer=buffer: buffer.zero_()), weakref.ref(buffer)
    del buffer
    assert alive() is not None
    del replay
    assert alive() is None


@pytest.mark.parametrize("script", ["model", "ragged_attention", "norm_linear", "fused_mlp"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: it would be timed")
def test_a_benchmark_says_that_it_needs_a_gpu(script: str) -> None:
    command = [sys.executable, f"bench/{script}.py", "--device", "cuda", "--shapes", "snp_deit_tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected an NVIDIA GPU that PyTorch sees, got none" in done.stderr
