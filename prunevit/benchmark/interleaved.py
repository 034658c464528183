"""Peers timed in turn, each in a process of its own.

A machine's clock drifts, so no time is compared with one taken minutes later: in every round each peer runs for a
moment, and what is quoted is the median over rounds of ratios within a round. A peer that is not running is stopped
(SIGSTOP): the spinning threads of one library cannot slow another.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..errors import PrunevitError

_ERROR = re.compile(r"[\w.]+(Error|Exception|Failed|Refused)\b")
BUILT_AT_ONCE = 2  # most of what starting takes is one thread's importing
PATIENCE = 60.0  # seconds that a turn may take beyond its own before its process counts as hung


class PeerFailed(PrunevitError):
    """A peer's process ended before it answered. The message has its last words."""


@dataclass
class Peer:
    """One implementation of one job, in its own process; ``samples[r]`` are the milliseconds of round r.

    The process is ``python PROGRAM JOB``: it answers a line of JSON when built, and one with ``ms`` for each line of
    seconds on its standard input, as :func:`serve` does.
    """

    name: str
    job: dict[str, Any]
    program: tuple[str, ...] = ("-m", "prunevit.benchmark.peers")
    samples: list[list[float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def start(self, threads: int) -> None:
        """Begin to build the peer in its process."""
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        job = json.dumps({**self.job, "impl": self.name, "threads": threads})
        command = [sys.executable, *self.program, job]
        # a file: what autotuning prints would fill a pipe that no one reads
        self.words = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process runs
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, text=True, env=env
        )

    def ready(self, within: float | None = None) -> None:
        """Wait until it is built, so many seconds at most, and leave it stopped. Raises :class:`PeerFailed`."""
        self.facts = self._answer(within)
        self._pause()

    def round(self, seconds: float) -> None:
        """Run for about ``seconds`` and note the times."""
        os.kill(self.process.pid, signal.SIGCONT)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended since: its answer says so
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.flush()
        self.samples.append(self._answer(seconds + PATIENCE)["ms"])
        self._pause()

    def stop(self) -> None:
        """End the process."""
        os.kill(self.process.pid, signal.SIGCONT)
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:  # it waits for a GPU that does not answer
            self.process.kill()
            self.process.wait()
        self.words.close()

    def _pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def _answer(self, within: float | None) -> dict[str, Any]:
        """The next line of JSON. Whoever takes longer is killed, which ends the reading."""
        assert self.process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self.process.kill()

        watch = threading.Timer(within or 0.0, give_up)
        if within is not None:
            watch.start()
        try:
            for line in self.process.stdout:
                if line.startswith("{"):
                    answer: dict[str, Any] = json.loads(line)
                    return answer
        finally:
            watch.cancel()
        self.words.seek(0)
        words = f"no answer within {within:.0f} s" if late.is_set() else _last_words(self.words.read())
        raise PeerFailed(f"{self.name}: {words}")

    def only(self, i: int) -> Peer:
        """The same with the ``i``-th time of each turn alone, where a turn times several works."""
        return Peer(self.name, self.job, samples=[[sample[i]] for sample in self.samples])

    def quantile(self, q: float) -> float:
        """The median over rounds of each round's quantile: a fast round, which has more calls, counts no more."""
        return statistics.median(sorted(ms)[min(int(q * len(ms)), len(ms) - 1)] for ms in self.samples)


def _last_words(said: str) -> str:
    """The last line that names an error, or the last one."""
    lines = said.strip().splitlines()
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "ended silently")


def serve(sample: Callable[[float], Any], **facts: Any) -> None:
    """The other end, in a peer's process: say that it is built, then answer each line of seconds with a sample."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        print(json.dumps({"ms": sample(float(line))}), flush=True)


def timed(run: Callable[[], object], seconds: float, least: int = 1) -> list[float]:
    """The milliseconds of each call, for about ``seconds`` and at least so many calls."""
    until, times = time.perf_counter() + seconds, list[float]()
    run()  # the first call after a pause finds cold caches and a sleeping pool: that is not what is compared
    while len(times) < least or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def run_interleaved(
    peers: Sequence[Peer],
    *,
    threads: int,
    rounds: int = 9,
    seconds: float = 0.4,
    progress: Callable[[str], None] = lambda _: None,
    at_once: int = BUILT_AT_ONCE,
    build_seconds: float | None = None,
    dispensable: Container[str] = (),
) -> dict[str, PeerFailed]:
    """Build every peer, ``at_once`` together, then let them run in turn; the order is reversed every other round.

    The first peer that fails, or is not built ``build_seconds`` after the call, ends it (:class:`PeerFailed`), unless
    its name is ``dispensable``: such a one is left out from then on. Returns what those failed of.
    """
    begun = time.monotonic()
    started: list[Peer] = []
    failed: dict[str, PeerFailed] = {}

    def tried(peer: Peer, step: Callable[[], None]) -> None:
        try:
            if peer.name not in failed:
                step()
        except PeerFailed as failure:
            if peer.name not in dispensable:
                raise
            failed[peer.name] = failure

    try:
        for first in range(0, len(peers), at_once):
            group = peers[first : first + at_once]
            progress(f"building {', '.join(peer.name for peer in group)}")
            for peer in group:
                peer.start(threads)
                started.append(peer)
            for peer in group:
                left = None if build_seconds is None else max(1.0, begun + build_seconds - time.monotonic())
                tried(peer, partial(peer.ready, left))
        for r in range(rounds):
            progress(f"round {r + 1} of {rounds}")
            for peer in peers if r % 2 == 0 else list(reversed(peers)):
                tried(peer, partial(peer.round, seconds))
                time.sleep(0.01)
    finally:
        for peer in started:
            peer.stop()
    return failed


def speedups(ours: Peer, other: Peer) -> list[float]:
    """How many times faster ``ours`` is, round by round: the ratio of the round's medians."""
    return [statistics.median(b) / statistics.median(a) for a, b in zip(ours.samples, other.samples, strict=True)]


def speedup(ours: Peer, other: Peer) -> float:
    """The median of :func:`speedups`."""
    return statistics.median(speedups(ours, other))


def best_of(others: Iterable[Peer], ours: Peer) -> Peer | None:
    """The one that ``ours`` is ahead of by least, in the rounds that they share."""
    return min(others, key=partial(speedup, ours), default=None)
