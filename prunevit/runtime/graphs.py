"""What a device adds to launching one step after another: turns on a stream, and launches recorded to be replayed."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch

from prunevit_kernels import Launch, Target

from ..errors import InputError, expect


class Recorder(Protocol):
    """The engine's view of a device. The engine holds its lock around every call."""

    @property
    def records(self) -> bool:
        """Whether launches are recorded; then a program's memory is its own, its inputs too unless they are many."""
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Within, whatever is launched runs after what earlier turns launched, on whichever stream."""
        ...

    def record(self, run: Launch) -> Launch:
        """``run`` as one launch, which is not launched now. It may be run once, and must not mind."""
        ...

    def settle(self) -> None:
        """Return when everything that earlier turns launched has ended: only then may its memory go."""
        ...


class Direct:
    """On a CPU: what was launched has ended."""

    records = False

    def turn(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, run: Launch) -> Launch:
        return run

    def settle(self) -> None:
        pass


class OnStreams:
    """On a GPU, launched step by step."""

    records = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Each turn waits, on the GPU, for the one before; callers do not wait for one another there."""
        with torch.cuda.device(self.device):
            expect(
                not torch.cuda.is_current_stream_capturing(),
                InputError,
                "no CUDA graph capture on the current stream: the runtime replays graphs of its own",
                got="a capture",
            )
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(stream)

    def record(self, run: Launch) -> Launch:
        return run

    def settle(self) -> None:
        self._done.synchronize()


# two captures at once would both register with PyTorch's one random generator of a device
_capturing = threading.Lock()


# of recorders that are gone, by device: what libraries keep for a stream, as cuBLAS its workspace, serves the next one
_idle: defaultdict[int, list[torch.cuda.Stream]] = defaultdict(list)


def _new_stream() -> torch.cuda.Stream:
    """Not one of PyTorch's: those are 32 that take turns, so that work of another thread may be captured with ours."""
    driver, handle, not_blocking = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(), 1
    status = driver.cuStreamCreate(ctypes.byref(handle), not_blocking)
    if status != 0 or handle.value is None:
        raise RuntimeError(f"cuStreamCreate failed: CUDA error {status}")
    stream: torch.cuda.Stream = torch.cuda.ExternalStream(handle.value)  # type: ignore[no-untyped-call]
    return stream


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage may hold graphs and events, whose end would break a capture."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class CudaGraphs(OnStreams):
    """On a GPU, a CUDA graph per program. The graphs share a memory pool: they take turns, and leave nothing in it."""

    records = True

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # the driver has a context in this thread from here on
            idle = _idle[torch.cuda.current_device()]
            self._stream = idle.pop() if idle else _new_stream()
            weakref.finalize(self, idle.append, self._stream).atexit = False
            self._pool = torch.cuda.graph_pool_handle()
        self._kept: torch.cuda.CUDAGraph | None = None

    def record(self, run: Launch) -> Launch:
        if self._kept is None:  # PyTorch ends a pool with the last of its graphs: this one is never launched, and stays
            self._kept = self._captured(torch.zeros(1, device=self.device).zero_)
        return self._captured(run).replay

    def _captured(self, run: Callable[[], object]) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with _capturing, torch.cuda.stream(self._stream), _nothing_collected():
            run()  # libraries have a handle for each thread, and may not make it during a capture
            # thread_local: what other threads of this process do meanwhile is no part of it
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph


def recorder_for(target: Target, cuda_graphs: bool) -> Recorder:
    """The recorder of a target: CUDA graphs for the cuda backend, unless they are not wanted."""
    if target.device.type != "cuda":
        return Direct()
    # the reference ops are not made for capture: they may synchronise
    return CudaGraphs(target.device) if cuda_graphs and target.backend == "cuda" else OnStreams(target.device)
