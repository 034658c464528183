"""The time of each of several launches that run one after another, by the clock that suits where they run."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch

from prunevit_kernels import Launch, Target
from prunevit_kernels.cpu import extension


class Stopwatch:
    """Runs launches in order and says how many ms each took."""

    def __init__(self, launches: list[Launch]) -> None:
        self.launches = launches

    def __call__(self) -> list[float]:
        times = [time.perf_counter()]
        for launch in self.launches:
            launch()
            times.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(times)]


class _NativeStopwatch(Stopwatch):
    """In one call of the C++ extension: no Python between the steps."""

    def __call__(self) -> list[float]:
        return [1e3 * seconds for seconds in extension().Program(self.launches).timed()]


class _EventStopwatch(Stopwatch):
    """By events on the GPU's own clock."""

    def __init__(self, launches: list[Launch], device: torch.device) -> None:
        super().__init__(launches)
        self.device = device

    def __call__(self) -> list[float]:
        with torch.cuda.device(self.device):
            return self._timed()

    def _timed(self) -> list[float]:
        make: Any = torch.cuda.Event
        sleep: Any = torch.cuda._sleep
        events = [make(enable_timing=True) for _ in range(len(self.launches) + 1)]
        # the GPU waits until the host has queued the steps: small ones end before the next could be launched
        sleep(100_000 * len(self.launches))  # cycles: about 50 µs a step, which may be several launches
        events[0].record()
        for launch, event in zip(self.launches, events[1:]):
            launch()
            event.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(events)]


def stopwatch(launches: list[Launch], target: Target) -> Stopwatch:
    """Without Python between the steps where all of them are native, and by events on a GPU."""
    if target.device.type == "cuda":
        return _EventStopwatch(launches, target.device)
    native = target.backend == "cpu" and all(isinstance(launch, extension().Launch) for launch in launches)
    return _NativeStopwatch(launches) if native else Stopwatch(launches)
