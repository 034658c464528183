"""The C++ kernels' threads: forks, several callers, several pools, launches run as one, the end of a process."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from prunevit_kernels import FusedMlp, Launch, NormLinear, PoolHead, Target, cpu, fuse


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


def test_a_fork_while_another_thread_binds() -> None:
    """Binding grows a pool's scratch memory: a child has the old or the new, whenever it was forked."""
    target, rows = Target("cpu", threads=2), 12000
    x, y = torch.zeros(1, rows, 1024), torch.zeros(1, rows, 8)
    op = PoolHead(1024, "none", 0, 1e-6, None, None, torch.randn(8, 1024), torch.zeros(8))
    packed = [op.pack(target)]
    launches, over = [packed[0].bind(x[:, :9], y[:, :9])], threading.Event()

    def grow() -> None:
        while not over.is_set():
            packed[0] = op.pack(Target("cpu", threads=2))
            launches.append(packed[0].bind(x[:, :9], y[:, :9]))
            del launches[0]
            for n in range(8200, rows, 4):  # scratch memory so large that its pages go when it is freed
                if over.is_set():
                    break
                packed[0].bind(x[:, :n], y[:, :n])

    with ThreadPoolExecutor(1) as caller:
        growing = caller.submit(grow)
        codes = []
        for _ in range(200):
            launch = launches[-1]
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                launch()
                os._exit(0)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        over.set()
        growing.result()
    assert set(codes) == {0}


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
    op, x, y = NormLinear(64, torch.randn(130, 64), None, 1e-6), torch.randn(1, 9, 64), torch.zeros(1, 9, 130)
    want, buffer = norm_of(op, x), weakref.ref(x)
    program = fuse([op.pack(target).bind(x, y)], target)
    del op, x, target
    gc.collect()
    assert buffer() is not None
    program()
    torch.testing.assert_close(y, want)


LIMITED = """
import os, resource
from tests.kernels.test_native_threads import Target, layer
launch, y, want = layer(0, Target("cpu", threads=8), rows=3000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
no_limit = resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20), no_limit))
try:
    launch()
except RuntimeError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (no_limit, no_limit))
launch()
print((y - want).abs().max().item() < 1e-4)
"""


def after(code: str) -> str:
    """What a process of its own prints, once it has ended well."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory that keeps a thread from starting is Linux's")
def test_threads_that_could_not_start_are_an_error_and_start_the_next_time() -> None:
    first, second = after(LIMITED).splitlines()
    assert re.match(r"expected to run on 8 threads, got [1-7]: ", first)
    assert second == "True"


def test_a_process_ends_while_a_daemon_is_inside_a_launch() -> None:
    start = """
import threading, time
from tests.kernels.test_native_threads import Target, layer
launch, *_ = layer(0, Target("cpu", threads=1), rows=3000)
def forever():
    while True:
        launch()
threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
print("done")
"""
    assert after(start) == "done\n"


def test_ops_run_in_a_thread_that_outlives_the_main_one() -> None:
    start = """
import threading, torch
from prunevit_kernels import library
torch.set_num_threads(2)
x, weight = torch.randn(1, 50, 768), torch.randn(2304, 768)  # 7 MB, compared on two threads
def serve():
    before = library.plain["norm_linear"](x, weight, None, 1e-6)
    threading.main_thread().join()
    print(torch.equal(library.plain["norm_linear"](x, weight, None, 1e-6), before))
threading.Thread(target=serve).start()
"""
    assert after(start) == "True\n"


def test_binding_does_not_wait_for_another_threads_launch() -> None:
    target = Target("cpu", threads=1)
    launch, *_ = layer(0, target, rows=200_000)
    with ThreadPoolExecutor(1) as caller:
        running, bound = caller.submit(launch), 0
        while not running.done():
            layer(1, target, rows=50)
            bound += 1
    assert bound > 3


def test_two_first_users_of_a_target_get_one_pool() -> None:
    for _ in range(20):
        target, start = Target("cpu", threads=1), threading.Barrier(4)
        with ThreadPoolExecutor(4) as users:
            pools = list(users.map(lambda _: (start.wait(), target.pool)[1], range(4)))  # noqa: B023
        assert len(set(map(id, pools))) == 1
