"""The cost table: step times over a grid of widths, measured when first asked for, kept on disk, interpolated."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import Any

from prunevit_kernels import Target
from prunevit_kernels.target import cpu_extension_built

from ..errors import CheckpointError
from ..machine import machine
from ..runtime.sizes import StepSize, sizes_of
from ..spec import ViTSpec
from .kernels import Clock

logger = logging.getLogger("prunevit")

FORMAT, _WHOLE = 1, "model "
Node = tuple[str, tuple[str | int | bool, ...], tuple[int, ...]]
OnNode = Callable[[int, int], None]
"""Called with how many steps have been timed, and how many are wanted by now."""

# powers of two and what lies halfway: kernels are close to linear between them
GRID = sorted({2**k for k in range(21)} | {3 * 2**k for k in range(20)})


class Table:
    """Step times of one target and batch. ``like`` is the model to be pruned: its own widths are on the grid too.

    A file holds what was measured with the machine and versions that it belongs to; each spec's new nodes are written
    at once, so that an interrupted search measures nothing twice. A file of another machine, version, target or batch
    is refused (:class:`CheckpointError`, which says what differs), or where ``rebuild`` is set, replaced. With
    ``remeasure`` any table is.
    """

    def __init__(
        self,
        target: Target,
        batch: int,
        like: ViTSpec,
        path: Path,
        *,
        rebuild: bool = False,
        remeasure: bool = False,
        on_node: OnNode | None = None,
    ) -> None:
        self.target, self.batch, self.path, self.on_node = target, batch, path, on_node
        self.of = identity(target, batch)
        self.ms: dict[str, float] = {}
        if path.exists():
            self.ms = self._read(rebuild or remeasure)
            if remeasure:
                self.ms = {}
        self.done = self.wanted = 0
        self.like = like
        self.own: dict[tuple[str, int], set[int]] = {}
        for step in sizes_of(like, target):
            for place, width in enumerate(step.widths):
                self.own.setdefault((step.op, place), set()).add(round(width))
        self.nodes = cache(self._nodes)

    def spec_ms(self, spec: ViTSpec) -> float:
        """The sum over the steps of a spec's plan; nodes that are not in the table yet are measured first."""
        steps = sizes_of(spec, self.target)
        self._measure({node for step in steps for node, _ in self._corners(step)})
        return sum(share * self.ms[_key(node)] for step in steps for node, share in self._corners(step))

    def whole_ms(self, spec: ViTSpec, measure: Callable[[], float], most: float = math.inf) -> float:
        """The time of a whole model of this shape, measured once; what is above ``most`` is not believed, nor kept."""
        key = _WHOLE + hashlib.sha256(json.dumps(spec.to_dict(), sort_keys=True).encode()).hexdigest()[:24]
        if self.ms.get(key, math.inf) > most or key not in self.ms:
            self.ms.pop(key, None)
            if (ms := measure()) > most:
                return ms
            self.ms[key] = ms
            self.save()
        return self.ms[key]

    def forget_wholes(self) -> None:
        """Whole models are to be timed again; steps are kept, which were timed beside a reference."""
        self.ms = {key: ms for key, ms in self.ms.items() if not key.startswith(_WHOLE)}

    @cached_property
    def clock(self) -> Clock:
        """Made when something has to be timed. Its reference is the given model's first MLP, or what it has instead."""
        steps = sizes_of(self.like, self.target)
        reference = next((step for step in steps if step.op == "fused_mlp"), steps[0])
        key = f"reference {reference.op} {reference.fixed} {reference.widths}"
        clock = Clock(self.target, self.batch, reference, self.ms.get(key))
        self.ms[key] = clock.reference_ms
        return clock

    def _measure(self, nodes: Iterable[Node]) -> None:
        missing = sorted(node for node in nodes if _key(node) not in self.ms)
        if not missing:
            return
        self.wanted += len(missing)
        for node in missing:
            self.ms[_key(node)] = self.clock.step_ms(*node)
            self.done += 1
            if self.on_node is not None:
                self.on_node(self.done, self.wanted)
        self.save()

    def _corners(self, step: StepSize) -> Iterator[tuple[Node, float]]:
        """The nodes around a step, and each one's share: linear in every width."""
        sides = [self.nodes(step.op, place, width) for place, width in enumerate(step.widths)]
        for corner in product(*sides):
            yield (step.op, step.fixed, tuple(node for node, _ in corner)), math.prod(share for _, share in corner)

    def _nodes(self, op: str, place: int, width: float) -> tuple[tuple[int, float], ...]:
        grid = sorted({*GRID, *self.own.get((op, place), ())})
        at = bisect_left(grid, width)
        if grid[at] == width:
            return ((grid[at], 1.0),)
        low, high = grid[at - 1], grid[at]
        share = (width - low) / (high - low)
        return (low, 1 - share), (high, share)

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        partial.write_text(json.dumps({"format": FORMAT, "of": self.of, "ms": self.ms}, indent=0) + "\n", "utf-8")
        os.replace(partial, self.path)

    def _read(self, rebuild: bool) -> dict[str, float]:
        try:
            data = json.loads(self.path.read_text("utf-8"))
            of, ms = data["of"], {str(key): float(value) for key, value in data["ms"].items()}
            differs = _differences(of, self.of) if data["format"] == FORMAT else [f"format {data['format']}"]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            what = f"{self.path}: expected a latency table, or a name that no file has yet, got {error!r}"
            raise CheckpointError(what) from None
        if not differs:
            return ms
        what = f"{self.path}: expected a latency table of this machine and target, got one with {'; '.join(differs)}"
        if not rebuild:
            raise CheckpointError(f"{what}: measure anew by remeasure (--remeasure), or name another file")
        logger.warning("%s: measuring anew", what)
        return {}


def identity(target: Target, batch: int) -> dict[str, Any]:
    """What a measured time belongs to."""
    here = machine(target.device)
    versions = {name: here["versions"][name] for name in ("prunevit", "torch")}
    return {
        "batch": batch,
        "backend": target.backend,
        "device": target.device.type,
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": target.threads,
        "kernels": _kernels(target),
        **{name: here[name] for name in ("cpu", "gpu", "system")},
        **versions,
    }


def default_path(target: Target, batch: int) -> Path:
    """In the user's cache folder, one file for each target and batch."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunevit"
    dtype = str(target.dtype).removeprefix("torch.")
    threads = f"-{target.threads}threads" if target.device.type == "cpu" else ""
    return folder / f"latency-{target.backend}-{target.device.type}-{dtype}-batch{batch}{threads}.json"


def _kernels(target: Target) -> str:
    """What the kernels are: a build of the extension, or the package's version alone."""
    if target.backend == "cpu" and cpu_extension_built():
        from prunevit_kernels.cpu import extension

        module = extension()
        assert module.__file__ is not None
        build = hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest()[:12]
        return f"{module.isa()} {build}"
    return target.backend


def _differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    return [
        f"{name} {found.get(name)!r} instead of {want!r}" for name, want in expected.items() if found.get(name) != want
    ]


def _key(node: Node) -> str:
    op, fixed, widths = node
    return f"{op} {','.join(map(str, fixed))} {','.join(map(str, widths))}"
