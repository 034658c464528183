"""Programs by input shape: a packed plan bound to memory, run step by step or replayed as one recording."""

from __future__ import annotations

import math
import os
import threading
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunevit_kernels import Launch, PackedOp, Rebindable, Target, fuse
from prunevit_kernels.op import SHAPES

from .arena import Arena, Need
from .graphs import Direct, Recorder
from .plan import Plan
from .walk import COPIED_BYTES, View

ShapeKey = tuple[int, int, int]  # batch, image height, image width

COLD_SECONDS = 1.0  # a request that prepares for longer than this says so


@dataclass
class PackedPlan:
    """A plan with its weights in the target's layout, and only there: of its ops the shapes are left.

    All batch sizes share them, and all image sizes but for the first step's, which has the positions.
    """

    plan: Plan
    ops: list[PackedOp]

    @classmethod
    def of(cls, plan: Plan, target: Target, like: PackedPlan | None = None) -> PackedPlan:
        """An op's weights go from the plan as it is packed. ``like``: the same model, packed for another image size."""
        ops: list[PackedOp] = []
        for i, step in enumerate(plan.steps):
            ops.append(like.ops[i] if like and i else step.op.pack(target))
            plan.steps[i] = replace(step, op=step.op.to(SHAPES))
        return cls(plan, ops)


class Program:
    """A packed plan bound to buffers of one input shape. Not safe for two callers at once: the engine holds a lock.

    Images are read where the caller has them, by a first step that is bound anew at each call; everything else is
    fixed. With ``recorded``, few images are copied into a buffer of the program's own, so that the first step is fixed
    too; as are many, unless the first step can be bound anew cheaply.
    """

    def __init__(
        self,
        packed: PackedPlan,
        target: Target,
        image_shape: tuple[int, ...],
        arena: Arena | None = None,
        *,
        recorded: bool = False,
    ) -> None:
        self.packed, self.target, self.batch = packed, target, image_shape[0]
        steps = packed.plan.steps
        needs = _needs((view for step in steps for view in step.views), target, self.batch)
        pixels = math.prod(image_shape)
        many = pixels * target.dtype.itemsize > COPIED_BYTES
        copied = recorded and not (many and isinstance(packed.ops[0], Rebindable))
        if copied:
            needs["images"] = Need(pixels, target.dtype)
        self.storage = (arena or Arena(target.device)).take(needs)
        self.images = self.storage["images"].view(image_shape) if copied else None
        self.out = self.view(packed.plan.output)
        fixed = list(zip(steps, packed.ops))[0 if copied else 1 :]
        self.launches = [op.bind(*(self.view(view) for view in step.views)) for step, op in fixed]
        self.run = fuse(self.launches, target)
        self.calls = 0
        self.replay: Launch | None = None
        self._first: Callable[[Tensor], Launch] | None = None

    def view(self, view: View) -> Tensor:
        """The window of a view on its buffer's memory."""
        flat, b = self.storage[view.buffer], self.batch
        if view.buffer == "images":
            assert self.images is not None
            return self.images
        if view.buffer == "out":
            return flat.view(b, view.tokens, view.width) if view.tokens else flat.view(b, view.width)
        if view.width == 0:
            return flat[: b * view.tokens].view(b, view.tokens)
        pitch = self.target.pitch(view.width)
        return flat[: b * view.tokens * pitch].view(b, view.tokens, pitch)[:, : view.first, : view.width]

    def first(self, images: Tensor) -> Launch:
        """The first step on these images, which the door has checked."""
        if self._first is None:
            op, x = self.packed.ops[0], self.view(self.packed.plan.steps[0].views[1])
            self._first = op.rebindable(images, x) if isinstance(op, Rebindable) else lambda images: op.bind(images, x)
        return self._first(images)

    def take(self, images: Tensor) -> None:
        """Have the images where ``run`` begins."""
        if self.images is None:
            self.first(images)()
        else:
            self.images.copy_(images)

    def every_launch(self, images: Tensor) -> list[Launch]:
        """One launch a step, on these images."""
        if self.images is None:
            return [self.first(images), *self.launches]
        self.images.copy_(images)
        return self.launches

    def buffers(self, images: Tensor) -> list[list[Tensor]]:
        """What each step is bound to, when these images run."""
        shown = images if self.images is None else self.images
        return [
            [shown if view.buffer == "images" else self.view(view) for view in step.views]
            for step in self.packed.plan.steps
        ]


def _needs(views: Iterable[View], target: Target, batch: int) -> dict[str, Need]:
    """One flat buffer a name, as large as its largest view. Rows have the target's pitch, but for the output's."""
    needs: dict[str, Need] = {}
    for view in views:
        if view.buffer == "images":
            continue
        width = view.width if view.buffer == "out" else target.pitch(view.width)
        tokens = max(view.tokens, 1) if view.buffer == "out" else view.tokens
        size = batch * tokens * (width if view.width else 1)
        before = needs.get(view.buffer)
        dtype = torch.float32 if view.buffer.startswith("scores") else target.dtype
        needs[view.buffer] = Need(max(size, before.size if before else 0), dtype)
    return needs


class Engine:
    """Programs by input shape, in a bounded least-recently-used cache; weights and memory are shared between them.

    Calls from several threads, and on several streams, are safe: they take turns on the memory, and each output
    belongs to its caller. The first call of a shape runs step by step, the second records, and from then on it is
    replayed: a shape that comes once costs no recording.
    """

    def __init__(
        self,
        make_plan: Callable[[tuple[int, int], bool], Plan],
        target: Target,
        max_programs: int = 8,
        recorder: Recorder | None = None,
    ) -> None:
        self.make_plan, self.target, self.max_programs = make_plan, target, max_programs
        self.recorder: Recorder = recorder or Direct()
        self.arena = Arena(target.device)
        self.packed: OrderedDict[tuple[int, int], PackedPlan] = OrderedDict()
        self.programs: OrderedDict[ShapeKey, Program] = OrderedDict()
        self.lock = threading.Lock()
        _engines.add(self)
        # its memory may be another's as soon as it is gone, and its last call may still be running
        weakref.finalize(self, _settle, self.recorder, os.getpid()).atexit = False

    def __call__(self, images: Tensor) -> Tensor:
        with self.turn():
            return self.run(self._requested(images), images)

    def warm(self, images: Tensor) -> None:
        """Prepare for images of this shape: pack, bind, compile, and record where the device records."""
        with self.turn():
            program = self.program(images)
            for _ in range(3 if self.recorder.records else 1):  # step by step, recorded, and replayed
                self.run(program, images)
        self.recorder.settle()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, the engine's memory is the caller's alone."""
        with self.lock, self.recorder.turn():
            yield

    def run(self, program: Program, images: Tensor) -> Tensor:
        """One call, within a turn."""
        program.take(images)
        if self.recorder.records and program.replay is None and program.calls:
            program.replay = self.recorder.record(program.run)
            program.take(images)  # recording may have run the steps, which change what they are given
        (program.replay or program.run)()
        program.calls += 1
        return program.out.clone()

    def program(self, images: Tensor) -> Program:
        """The program for images of this shape, made now if need be. Within a turn."""
        batch, _, *size = images.shape
        key, img_size = (batch, size[0], size[1]), (size[0], size[1])
        if key in self.programs:
            self.programs.move_to_end(key)
            return self.programs[key]
        if len(self.programs) >= self.max_programs:
            self.recorder.settle()
        while len(self.programs) >= self.max_programs:
            self.programs.popitem(last=False)
        if img_size not in self.packed:
            like = next(iter(self.packed.values()), None)
            plan = self.make_plan(img_size, like is not None)
            self.packed[img_size] = PackedPlan.of(plan, self.target, like)
        shape, recorded = tuple(images.shape), self.recorder.records
        program = Program(self.packed[img_size], self.target, shape, self.arena, recorded=recorded)
        if program.images is None:
            program.first(images)  # compiled here, where what that takes is told
        self.programs[key] = program
        alive = {known[1:] for known in self.programs}
        for stale in [known for known in self.packed if known not in alive]:
            del self.packed[stale]
        return program

    def _requested(self, images: Tensor) -> Program:
        start = time.perf_counter()
        program = self.program(images)
        seconds = time.perf_counter() - start
        if self.recorder.records and seconds > COLD_SECONDS:
            shape = " × ".join(map(str, images.shape))
            warnings.warn(
                f"this call spent {seconds:.1f} s packing and compiling for images of {shape}: call "
                f"warmup({images.shape[0]}) beforehand to keep that out of requests",
                RuntimeWarning,
                stacklevel=4,
            )
        return program


def _settle(recorder: Recorder, process: int) -> None:
    if os.getpid() == process:  # a fork's child has no GPU
        recorder.settle()


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    """A child has no other thread: whoever held a lock in the parent will not give it back here."""
    for engine in _engines:
        engine.lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
