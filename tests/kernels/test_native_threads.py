"""The C++ kernels' door and threads: bad buffers, forks, several callers, several pools, launches run as one."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from prunevit_kernels import FusedMlp, Launch, MissingExtension, NormLinear, Target, cpu, fuse


def layer(seed: int, target: Target, rows: int = 150) -> tuple[Launch, Tensor, Tensor]:
    """A launch, what it writes and what it should write."""
    torch.manual_seed(seed)
    x, y = torch.randn(1, rows, 64) + 3, torch.zeros(1, rows, 130)
    op = NormLinear(64, torch.randn(130, 64) / 8, torch.randn(130), 1e-6)
    want = torch.zeros_like(y)
    op.reference(x, want)
    return op.pack(target).bind(x, y), y, want


def test_more_threads_than_work_or_cores_give_the_same_result() -> None:
    results = []
    for threads in (1, 2, 3, 7):
        launch, y, want = layer(0, Target("cpu", threads=threads))
        launch()
        torch.testing.assert_close(y, want)
        results.append(y)
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.parametrize("targets", [1, 4], ids=["take_turns_on_one_pool", "run_at_once_on_their_own"])
def test_several_callers(targets: int) -> None:
    pools = [Target("cpu", threads=2) for _ in range(targets)]
    layers = [layer(seed, pools[seed % targets]) for seed in range(4)]

    def call_often(which: int) -> None:
        launch, y, want = layers[which]
        for _ in range(50):
            y.zero_()
            launch()
            torch.testing.assert_close(y, want)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(call_often, range(4)))


def test_a_forked_child_starts_threads_of_its_own() -> None:
    launch, y, want = layer(0, Target("cpu", threads=3))
    launch()
    y.zero_()
    child = os.fork()
    if child == 0:  # only os._exit from here: the test runner must not run twice
        launch()
        os._exit(0 if torch.allclose(y, want, atol=1e-4) else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    launch()
    torch.testing.assert_close(y, want)


def test_a_fork_while_another_thread_is_inside_a_launch() -> None:
    launch, y, want = layer(0, Target("cpu", threads=2), rows=2000)
    with ThreadPoolExecutor(1) as caller:
        running = caller.submit(lambda: [launch() for _ in range(200)])
        for _ in range(5):
            child = os.fork()
            if child == 0:
                launch()
                os._exit(0 if torch.allclose(y, want, atol=1e-4) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        running.result()


def test_fused_launches_run_in_order_in_one_call_and_can_be_timed() -> None:
    target = Target("cpu", threads=2)
    torch.manual_seed(0)
    x, y = torch.randn(1, 150, 64), torch.zeros(1, 150, 130)
    mlp = FusedMlp(64, torch.randn(90, 64) / 8, None, torch.randn(64, 90) / 9, None, "gelu", 1e-6)
    norm = NormLinear(64, torch.randn(130, 64) / 8, None, 1e-6)
    expected_x, expected_y = x.clone(), y.clone()
    mlp.reference(expected_x)
    norm.reference(expected_x, expected_y)
    called: list[int] = []
    launches: list[Launch] = [mlp.pack(target).bind(x), norm.pack(target).bind(x, y)]
    one = fuse(launches, target)
    assert isinstance(one, cpu.extension().Program)
    one()
    torch.testing.assert_close(y, expected_y)
    seconds = one.timed()
    assert len(seconds) == len(one) == 2
    assert min(seconds) > 0
    y.zero_()
    fuse([launches[1], lambda: called.append(1), launches[1]], target)()
    assert called == [1]
    torch.testing.assert_close(y[0, 0], norm_of(norm, x)[0, 0])


def norm_of(op: NormLinear, x: Tensor) -> Tensor:
    y = torch.zeros(*x.shape[:2], op.out_dim)
    op.reference(x, y)
    return y


def test_a_launch_keeps_its_buffers_and_weights_alive() -> None:
    target = Target("cpu", threads=1)
    launch = NormLinear(64, torch.randn(130, 64), None, 1e-6).pack(target).bind(torch.randn(1, 9, 64), y := zeros())
    program = fuse([launch], target)
    del launch, target
    program()
    assert y.abs().sum() > 0


def zeros() -> Tensor:
    return torch.zeros(1, 9, 130)


def test_the_native_door_refuses_what_would_be_out_of_bounds() -> None:
    native = cpu.extension()
    pool, linear = native.Pool(1), cpu.packed_linear(torch.randn(5, 7), None)
    x, y = torch.randn(3, 7), torch.zeros(3, 5)
    good = (x.data_ptr(), 3, 7, 7), (y.data_ptr(), 3, 5, 5)
    native.norm_linear(None, pool, linear, *good, 1e-6)()
    for bad, message in {
        ((0, 3, 7, 7), good[1]): "null",
        ((x.data_ptr(), 3, 7, 6), good[1]): "pitch",
        ((x.data_ptr(), 3, 6, 7), good[1]): "wide",
        (good[0], (y.data_ptr(), 2, 5, 5)): "rows",
        (good[0], (y.data_ptr(), 3, 4, 5)): "wide",
        ((x.data_ptr(), -3, 7, 7), good[1]): "at least one row",
    }.items():
        with pytest.raises(ValueError, match=message):
            native.norm_linear(None, pool, linear, *bad, 1e-6)
    with pytest.raises(ValueError, match="threads"):
        native.Pool(0)
    with pytest.raises(ValueError, match="below 4"):
        native.norm_linear(
            None, pool, cpu.packed_linear(torch.randn(5, 2), None, reads=[0, 6]), (x.data_ptr(), 3, 4, 7), good[1], 1e-6
        )


def test_a_missing_extension_is_an_error_with_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prunevit_kernels._cpu", None)
    with pytest.raises(MissingExtension, match=r"setup\.py build_ext --inplace"):
        NormLinear(3, torch.ones(2, 3), None, 1e-6).pack(Target("cpu"))


@pytest.mark.parametrize("isa", ["avx1024", "baseline "])
def test_an_unknown_instruction_set_is_a_named_error(isa: str) -> None:
    code = "from prunevit_kernels import _cpu; _cpu.isa()"
    env = {**os.environ, "PRUNEVIT_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "IsaError: expected PRUNEVIT_CPU_ISA to be one of" in done.stderr
    assert f"got {isa}" in done.stderr


def test_the_probes_measure_something() -> None:
    native = cpu.extension()
    assert native.fma_peak(1, 5) > 1e8
    assert native.bandwidth(1, 1 << 20, 5) > 1e7
