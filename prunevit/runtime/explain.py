"""Why is it as fast as it is: every step of a program, measured, beside its work and what the machine can do."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from prunevit_kernels import Launch, Target

from ..machine import machine
from ..spec import ViTSpec
from .backend import count
from .door import size_of
from .engine import Program
from .peaks import PeakProbe, Peaks
from .plan import Step
from .stopwatch import stopwatch
from .work import exponentials, kernel_of, useful_bytes, work_of

if TYPE_CHECKING:
    from .explain_text import StepTable
    from .runtime import Runtime


@dataclass(frozen=True)
class StepReport:
    """One step for a whole batch. ``macs`` and ``bytes`` are useful work; ``executed_macs`` count what pads tiles too.

    ``bytes`` are inputs, weights and outputs, each moved once. ``bound`` says which of the machine's peaks the step
    would meet first if nothing else held it back, ``floor_ms`` when.
    """

    name: str
    op: str
    block: int | None
    work: str
    macs: int
    executed_macs: int | None
    bytes: int
    ms: float
    gflops: float
    peak_share: float
    floor_ms: float
    bound: Literal["compute", "memory", "exponentials"]
    kernel: str
    why: str

    @property
    def waste(self) -> float | None:
        """The share of executed multiply-accumulates that are padding; None where they are not known."""
        return None if not self.executed_macs else 1 - self.macs / self.executed_macs


@dataclass(frozen=True)
class Explanation:
    """What :meth:`Runtime.explain` measured. Prints as a table; ``to_json`` and ``to_html`` are the other forms.

    ``spec`` and ``dense`` have the image size that was measured.
    """

    model: str
    spec: ViTSpec
    dense: ViTSpec | None
    batch: int
    rounds: int
    backend: str
    device: str
    dtype: str
    threads: int
    steps: tuple[StepReport, ...]
    call_ms: float
    peaks: Peaks
    buffer_bytes: int
    padding_bytes: int
    machine: dict[str, Any]

    @property
    def steps_ms(self) -> float:
        return sum(step.ms for step in self.steps)

    @property
    def macs(self) -> int:
        return sum(step.macs for step in self.steps)

    @property
    def gflops(self) -> float:
        """Of a whole call."""
        return 2e-6 * self.macs / self.call_ms

    @property
    def peak_share(self) -> float:
        return 1e9 * self.gflops / self.peaks.flops

    @property
    def waste(self) -> float | None:
        executed = [step.executed_macs for step in self.steps]
        known = [macs for macs in executed if macs is not None]
        return None if len(known) < len(executed) else 1 - self.macs / sum(known)

    @property
    def dense_macs(self) -> int | None:
        """Of the batch, through the model that this one was pruned from."""
        return None if self.dense is None else self.dense.macs(self.batch)

    def by_op(self) -> list[tuple[str, float, int]]:
        """Time in ms and MACs of each kind of step, slowest first."""
        totals: dict[str, tuple[float, int]] = {}
        for step in self.steps:
            ms, macs = totals.get(step.op, (0.0, 0))
            totals[step.op] = (ms + step.ms, macs + step.macs)
        return sorted(((op, ms, macs) for op, (ms, macs) in totals.items()), key=lambda row: -row[1])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        data = {name: getattr(self, name) for name in ("model", "batch", "rounds", "backend", "device", "dtype")}
        return {
            **data,
            "threads": self.threads,
            "call_ms": self.call_ms,
            "steps_ms": self.steps_ms,
            "macs": self.macs,
            "spec_macs": self.spec.macs(self.batch),
            "dense_macs": self.dense_macs,
            "gflops": self.gflops,
            "peak_share": self.peak_share,
            "waste": self.waste,
            "buffer_bytes": self.buffer_bytes,
            "padding_bytes": self.padding_bytes,
            "peaks": asdict(self.peaks),
            "steps": [{**asdict(step), "waste": step.waste} for step in self.steps],
            "machine": self.machine,
            "spec": self.spec.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def to_html(self) -> str:
        """One page that needs no other file and no network."""
        from .explain_html import page

        return page(self)

    def table(self) -> StepTable:
        """For a terminal, with rich."""
        from .explain_text import StepTable

        return StepTable(self)

    def save_html(self, path: str | Path) -> Path:
        """Write the page."""
        path = Path(path)
        path.write_text(self.to_html(), "utf-8")
        return path

    def __str__(self) -> str:
        from .explain_text import text

        return text(self)


def explain(runtime: Runtime, batch: int = 1, rounds: int = 20, img_size: tuple[int, int] | None = None) -> Explanation:
    """Measure every step of a runtime's program for one batch size. See :meth:`Runtime.explain`."""
    batch, rounds, size = count(batch, "batch"), count(rounds, "rounds"), size_of(img_size, runtime.spec)
    target, engine = runtime.target, runtime._engine
    chance = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(batch, runtime.spec.in_chans, *size, generator=chance, dtype=torch.float32, device="cpu")
    # through the door, for its checks and its padding of odd sizes
    images = runtime._door.admit(images.to(target.device))
    probe = PeakProbe(target)
    # whatever else calls the runtime waits: its turn would be counted as a step's time
    with engine.turn():
        program = engine.program(images)
        launches = program.every_launch(images)
        call_ms, step_ms = _measure(lambda: engine.run(program, images), launches, target, rounds, probe)
        peaks = probe.result()
        steps = program.packed.plan.steps
        buffers = program.buffers(images)
        reports = [
            _report(step, program.packed.ops[i], buffers[i], ms, batch, target, peaks)
            for i, (step, ms) in enumerate(zip(steps, step_ms))
        ]
        held = sum(memory.nbytes for memory in program.storage.values())
        useful = _largest_views(program, steps)
    dense = runtime.dense_spec
    return Explanation(
        model=runtime.name,
        spec=runtime.spec.replace(img_size=size),
        dense=None if dense is None else dense.replace(img_size=size),
        batch=batch,
        rounds=rounds,
        backend=target.backend,
        device=str(target.device),
        dtype=str(target.dtype).removeprefix("torch."),
        threads=torch.get_num_threads() if target.backend == "torch" else target.threads,
        steps=tuple(reports),
        call_ms=call_ms,
        peaks=peaks,
        buffer_bytes=held,
        padding_bytes=held - useful,
        machine=machine(),
    )


def _largest_views(program: Program, steps: Sequence[Step]) -> int:
    """Bytes that the buffers would have without pitches."""
    sizes: dict[str, int] = {}
    for view in (view for step in steps for view in step.views):
        if view.buffer in program.storage:
            sizes[view.buffer] = max(sizes.get(view.buffer, 0), program.view(view).nbytes)
    return sum(sizes.values())


def _measure(
    call: Callable[[], Tensor], launches: list[Launch], target: Target, rounds: int, probe: PeakProbe
) -> tuple[float, list[float]]:
    """The median time of a whole call, and of each step in its place among the others, in ms."""
    timed = stopwatch(launches, target)
    for _ in range(2):
        call()
        timed()
    calls, steps = [], []
    for _ in range(rounds):
        probe.sample()
        call()  # what follows the probe finds cold caches: that is not what is asked
        probe.wait()
        start = time.perf_counter()
        call()
        probe.wait()
        calls.append(1e3 * (time.perf_counter() - start))
        steps.append(timed())
    return statistics.median(calls), [statistics.median(times) for times in zip(*steps)]


def _report(
    step: Step, packed: Any, buffers: list[Tensor], ms: float, batch: int, target: Target, peaks: Peaks
) -> StepReport:
    macs, moved = step.macs * batch, useful_bytes(step.op, buffers, target)
    least = {"compute": 2 * macs / peaks.flops, "memory": moved / peaks.memory}
    if peaks.exps is not None:
        least["exponentials"] = exponentials(step.op, buffers) / peaks.exps
    bound: Any = max(least, key=least.__getitem__)
    gflops = 2e-6 * macs / ms
    kernel, executed = kernel_of(step.op, packed, buffers, target)
    return StepReport(
        name=step.name,
        op=step.name.rsplit(".", 1)[-1],
        block=step.block,
        work=work_of(step.op, buffers),
        macs=macs,
        executed_macs=executed,
        bytes=moved,
        ms=ms,
        gflops=gflops,
        peak_share=1e9 * gflops / peaks.flops,
        floor_ms=1e3 * least[bound],
        bound=bound,
        kernel=kernel.name,
        why=kernel.why,
    )
