"""The latency of a spec in ms: the table's sum, corrected by whole models; and the check of what pruning came to."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import BudgetError
from ..models import PrunedViT
from ..runtime import Runtime
from ..spec import ViTSpec
from .deployment import Deployment
from .table import OnNode, Table

logger = logging.getLogger("prunevit")

SECONDS, ROUNDS = 1.0, 7  # a whole model is timed for at least so long, and at least in so many turns
CALLS = 3  # of each model in a turn, after one that warms its caches
BUSY = 2.0  # times what the given model takes now: the machine did something else when that was measured
SLOWER = 1.25  # times the given model: no pruned one is, by more than noise


@dataclass(frozen=True)
class Check:
    """What was asked for, what the table says of the pruned model, and what the whole of it takes, in ms.

    ``measured_ms`` is on the scale of ``dense_ms``, the time of the given model when the table was calibrated: both
    were timed in turns, so that a machine that has become busier in between does not count. ``now_ms`` are the two
    times as they were, given model first.
    """

    limit_ms: float
    predicted_ms: float
    measured_ms: float
    dense_ms: float
    now_ms: tuple[float, float]
    attempts: int

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured."""
        return self.predicted_ms / self.measured_ms - 1

    def holds(self, tolerance: float) -> bool:
        return self.measured_ms <= self.limit_ms * (1 + tolerance) and abs(self.error) <= tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "now_ms": list(self.now_ms), "error": self.error}


class LatencyMiss(BudgetError):
    """What the whole pruned model takes is not what the table said. ``model`` is that model, ``check`` the figures."""

    def __init__(self, message: str, model: PrunedViT, check: Check) -> None:
        super().__init__(message)
        self.model, self.check = model, check


class Measured:
    """Call it with a spec: its latency on a deployment, in ms. ``model`` is what is to be pruned."""

    def __init__(self, model: PrunedViT, deployment: Deployment, on_node: OnNode | None = None) -> None:
        self.deployment, self.spec = deployment, model.spec
        path, rebuild = deployment.table_path, deployment.table is None
        again = deployment.remeasure
        self.table = Table(
            deployment.target, deployment.batch, model.spec, path, rebuild=rebuild, remeasure=again, on_node=on_node
        )
        self.dense = self._runtime(model)
        self.anchors: list[tuple[float, float]] = []
        now = self._time([self.dense])[0]
        if (then := self.table.whole_ms(model.spec, lambda: now)) > BUSY * now:
            what = "expected whole models timed on a machine that does nothing else, got"
            logger.warning("%s: %s %.4g ms for one that takes %.4g ms: timing them anew", path, what, then, now)
            self.table.forget_wholes()
        self.dense_ms = self._anchor(model.spec, lambda: now)

    def __call__(self, spec: ViTSpec) -> float:
        ms = self.table.spec_ms(spec)
        return ms * self._correction(ms)

    @property
    def source(self) -> str:
        """Where the times come from, and what to do where they cannot be right."""
        return f"times are from {self.table.path}; where they cannot be right, measure anew by remeasure (--remeasure)"

    def aim(self, most: float) -> None:
        """Calibrate near a budget of ``most`` ms: time the given model pruned evenly to about that."""
        low, high = 0.02, 1.0
        while high - low > 0.02:
            middle = (low + high) / 2
            low, high = (middle, high) if self(_evenly(self.spec, middle)) <= most else (low, middle)
        spec = _evenly(self.spec, low)
        if spec != self.spec:
            self._anchor(spec, lambda: self._beside(_random(spec))[0])

    def within(self, most: float, prune: Callable[[int], PrunedViT], attempts: int) -> PrunedViT:
        """``prune(attempt)`` until the whole model takes what the table says, and at most ``most`` ms.

        Raises :class:`LatencyMiss` after the last attempt.
        """
        for attempt in range(attempts):
            small = prune(attempt)
            check = self.check(small, most, attempt + 1)
            if check.holds(self.deployment.tolerance):
                break
            self._anchor(small.spec, lambda check=check: check.measured_ms)  # type: ignore[misc]
        else:
            raise LatencyMiss(
                f"latency: expected the whole model within {self.deployment.tolerance:.0%} of the "
                f"{check.predicted_ms:.4g} ms that the table says, and of the budget of {most:.4g} ms, got "
                f"{check.measured_ms:.4g} ms; attempts: {attempts}. Time on a machine that does nothing else, or "
                f"allow a larger tolerance or more attempts; {self.source}",
                small,
                check,
            )
        small.provenance["latency"] = {**check.to_dict(), **self.deployment.to_dict(), **self.table.of}
        return small

    def check(self, small: PrunedViT, most: float, attempt: int = 1) -> Check:
        """Time the pruned model beside the given one."""
        measured, now = self._beside(small)
        return Check(most, self(small.spec), measured, self.dense_ms, now, attempt)

    def _beside(self, model: PrunedViT) -> tuple[float, tuple[float, float]]:
        """A model's time on the scale of the given one's, and both times as they are now, the given model's first."""
        dense, other = self._time([self.dense, self._runtime(model)])
        return self.dense_ms * other / dense, (dense, other)

    def _anchor(self, spec: ViTSpec, measure: Callable[[], float]) -> float:
        most = SLOWER * self.dense_ms if self.anchors else math.inf
        ms = self.table.whole_ms(spec, measure, most)
        if ms <= most:
            self.anchors = sorted({*self.anchors, (self.table.spec_ms(spec), ms)})
        return ms

    def _correction(self, ms: float) -> float:
        """What whole models take for each ms of their steps: linear between those that were timed."""
        known = [(at, whole / at) for at, whole in self.anchors]
        if ms <= known[0][0] or len(known) == 1:
            return known[0][1]
        for (low, before), (high, after) in pairwise(known):
            if ms <= high:
                share = (ms - low) / (high - low) if high > low else 0.0
                return before + share * (after - before)
        return known[-1][1]

    def _runtime(self, model: PrunedViT) -> Runtime:
        target = self.deployment.target
        return Runtime(model, device=target.device, dtype=target.dtype, backend=target.backend, threads=target.threads)

    @torch.inference_mode()
    def _time(self, runtimes: Sequence[Runtime]) -> list[float]:
        """The median time of a call of each, in ms. They take turns, and each turn's first call is not counted."""
        images = self._images()
        for runtime in runtimes:
            runtime.warmup(self.deployment.batch)
        times: list[list[float]] = [[] for _ in runtimes]
        start, rounds = time.perf_counter(), 0
        while rounds < ROUNDS or time.perf_counter() - start < SECONDS:
            for runtime, taken in zip(runtimes, times):
                runtime(images)
                taken += [_call_ms(runtime, images) for _ in range(CALLS)]
            rounds += 1
        return [statistics.median(taken) for taken in times]

    def _images(self) -> Tensor:
        shape = (self.deployment.batch, self.spec.in_chans, *self.spec.img_size)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return images.to(self.deployment.target.device)


def _call_ms(runtime: Runtime, images: Tensor) -> float:
    gpu = images.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize(images.device)
    start = time.perf_counter()
    runtime(images)
    if gpu:
        torch.cuda.synchronize(images.device)
    return 1e3 * (time.perf_counter() - start)


def _evenly(spec: ViTSpec, share: float) -> ViTSpec:
    """Every head and every MLP at ``share`` of its width."""

    def part(width: int) -> int:
        return max(1, round(share * width))

    blocks = [
        block.model_copy(
            update={
                "qk_dims": tuple(map(part, block.qk_dims)),
                "v_dims": tuple(map(part, block.v_dims)),
                "mlp_dim": part(block.mlp_dim) if block.mlp_dim else 0,
            }
        )
        for block in spec.blocks
    ]
    return spec.replace(blocks=tuple(blocks))


def _random(spec: ViTSpec) -> PrunedViT:
    """Time does not depend on the weights."""
    with torch.random.fork_rng([]):
        return PrunedViT(spec).eval()
