"""Interleaved timing: everyone has as many turns, rows say what ran, and a peer that fails says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunevit import checkpoint
from prunevit.benchmark import Peer, PeerFailed, best_of, compare, run_interleaved
from prunevit.benchmark.compare import onnx_file
from prunevit.benchmark.peers import build_model, spec_of
from prunevit.errors import InputError
from tests.specs import SPECS, random_model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model = random_model(SPECS["every_head_its_own_width"])
    return {"checkpoint": str(checkpoint.save(model, tmp_path_factory.mktemp("bench") / "tiny"))}


def test_times_a_checkpoint_against_its_dense_original(job: dict[str, str]) -> None:
    dense = {"spec": SPECS["uniform"].to_dict()}
    seen: list[str] = []
    found = compare(job, dense, batch=2, threads=1, rounds=2, seconds=0.02, peers=["eager"], progress=seen.append)
    assert [peer.name for peer in (found.ours, *found.pruned, *found.denses)] == ["prunevit", "eager", "eager"]
    assert all(len(peer.samples) == 2 for peer in (found.ours, *found.pruned, *found.denses))
    ours, eager, original = found.rows()
    assert ours["best_peer"] == "eager"
    assert ours["macs_ratio"] == pytest.approx(
        SPECS["uniform"].macs() / SPECS["every_head_its_own_width"].macs(), abs=1e-4
    )
    assert (eager["dense"], original["dense"]) == (False, True)
    assert ours["img_per_s"] == pytest.approx(2e3 / ours["ms_p50"], rel=1e-2)  # of a time with four decimals
    assert ours["ms_p20"] <= ours["ms_p50"] <= ours["ms_p80"]
    assert ours["prunevit_over_it"] == 1
    assert eager["prunevit_over_it"] == ours["ratio_to_best_peer"]
    assert ours["ratio_lowest"] <= ours["ratio_to_best_peer"] <= ours["ratio_highest"]
    assert "round 2 of 2" in seen


def test_the_best_peer_is_found_within_rounds() -> None:
    """The machine slows down after two rounds, and a slow peer was lucky once: by its median it would be the best."""
    ours = Peer("prunevit", {}, samples=[[1.0], [1.0], [10.0], [10.0], [10.0]])
    steady = Peer("openvino", {}, samples=[[1.3], [1.3], [13.0], [13.0], [13.0]])
    lucky = Peer("eager", {}, samples=[[2.0], [2.0], [12.0], [20.0], [20.0]])
    assert lucky.quantile(0.5) < steady.quantile(0.5)
    assert best_of([lucky, steady], ours) is steady
    assert best_of([], ours) is None


def test_a_round_with_more_calls_counts_no_more() -> None:
    peer = Peer("prunevit", {}, samples=[[1.0] * 50, [4.0, 4.0], [5.0, 6.0, 7.0]])
    assert peer.quantile(0.5) == 4.0


def test_every_peer_gets_the_same_weights(job: dict[str, str]) -> None:
    assert all((a == b).all() for a, b in zip(build_model(job).parameters(), build_model(job).parameters()))
    shape = {"spec": SPECS["uniform"].to_dict()}
    assert all((a == b).all() for a, b in zip(build_model(shape).parameters(), build_model(shape).parameters()))
    assert spec_of({"shape": "snp_deit_tiny"}).embed_dim < 192 + 1


def test_a_peer_that_ends_early_is_named() -> None:
    broken = Peer("eager", {}, program=("-c", "raise SystemExit('out of memory')"))
    with pytest.raises(PeerFailed, match=r"eager: .*out of memory"):
        run_interleaved([broken], threads=1, rounds=1)
    assert broken.process.poll() is not None


ANSWERS = """print('{"ms": [1.0]}', flush=True)"""


def test_a_dispensable_peer_that_fails_is_left_out() -> None:
    words = "import sys; sys.stderr.write('torch.X.CompileError: no room\\n\\nSet A_VARIABLE=1 for more'); sys.exit(1)"
    good = Peer("prunevit", {}, program=("-c", f"import sys; {ANSWERS}\nfor _ in sys.stdin: {ANSWERS}"))
    never = Peer("compiled", {}, program=("-c", words))
    once = Peer("eager", {}, program=("-c", f"import sys; {ANSWERS}; next(sys.stdin); {words}"))
    failed = run_interleaved([good, never, once], threads=1, rounds=3, dispensable={"compiled", "eager"})
    assert {name: str(failure) for name, failure in failed.items()} == {
        "compiled": "compiled: torch.X.CompileError: no room",
        "eager": "eager: torch.X.CompileError: no room",
    }
    assert len(good.samples) == 3


def test_a_dispensable_peer_that_hangs_is_left_out() -> None:
    good = Peer("prunevit", {}, program=("-c", f"import sys; {ANSWERS}\nfor _ in sys.stdin: {ANSWERS}"))
    hung = Peer("compiled", {}, program=("-c", "import time; time.sleep(1000)"))
    failed = run_interleaved([good, hung], threads=1, rounds=1, build_seconds=2.0, dispensable={"compiled"})
    assert str(failed["compiled"]) == "compiled: no answer within 2 s"
    assert hung.process.poll() is not None
    assert len(good.samples) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peers": ["tensorflow"]}, "peers out of eager"),
        ({"peers": []}, "at least one peer"),
        ({"batch": 0}, "at least one image"),
        ({"rounds": 0}, "at least one round"),
        ({"threads": 0}, "at least one thread"),
    ],
)
def test_refuses_before_it_starts_anything(job: dict[str, str], options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(job, **({"threads": 1} | options))  # type: ignore[arg-type]


def test_onnx_is_exported_once(job: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    pytest.importorskip("onnxscript", reason="ONNX peers need onnx and onnxscript")
    first = onnx_file({**job, "batch": 2})
    stamp = first.stat().st_mtime_ns
    assert onnx_file({**job, "batch": 2}) == first
    assert first.stat().st_mtime_ns == stamp
