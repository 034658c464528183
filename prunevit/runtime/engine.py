"""Buffers planned once for each input shape, and the steps bound to them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunevit_kernels import Launch, PackedOp, Rebindable, Target, fuse

from .plan import Plan, View

ShapeKey = tuple[int, int, int]  # batch, image height, image width


@dataclass
class PackedPlan:
    """A plan with its weights in the target's layout: made once for each image size, shared by every batch size."""

    plan: Plan
    ops: list[PackedOp]

    @classmethod
    def of(cls, plan: Plan, target: Target) -> PackedPlan:
        return cls(plan, [step.op.pack(target) for step in plan.steps])


class Program:
    """A packed plan bound to buffers of one batch size. Not safe for two callers at once: the engine holds a lock.

    Only the first step touches memory that belongs to the caller; it is bound anew at each call, and what follows is
    fixed.
    """

    def __init__(self, packed: PackedPlan, target: Target, batch: int) -> None:
        self.packed, self.target, self.batch = packed, target, batch
        steps = packed.plan.steps
        # a buffer made in inference mode could not be written outside
        with torch.inference_mode(False):
            self.storage = _allocate([view for step in steps for view in step.views], target, batch)
            self.out = self._new_output()
        after = zip(steps[1:], packed.ops[1:])
        self.launches = [op.bind(*(self.view(v) for v in step.views)) for step, op in after]
        self._run_rest = fuse(self.launches, target)
        self._x = self.view(steps[0].views[1])
        self._first: Callable[[Tensor], Launch] | None = None

    def view(self, view: View) -> Tensor:
        """The window of a view on its buffer's memory."""
        if view.buffer == "out":
            return self.out
        flat = self.storage[view.buffer]
        if view.width == 0:
            return flat[: self.batch * view.tokens].view(self.batch, view.tokens)
        pitch = self.target.pitch(view.width)
        window = flat[: self.batch * view.tokens * pitch].view(self.batch, view.tokens, pitch)[..., : view.width]
        return window[:, : view.first]

    def first(self, images: Tensor) -> Launch:
        """The first step on these images, which the engine's door has checked."""
        if self._first is None:
            op = self.packed.ops[0]
            self._first = op.rebindable(images, self._x) if isinstance(op, Rebindable) else self._bind_first
        return self._first(images)

    def _bind_first(self, images: Tensor) -> Launch:
        return self.packed.ops[0].bind(images, self._x)

    def _new_output(self) -> Tensor:
        view = self.packed.plan.output
        shape = (self.batch, view.tokens, view.width) if view.tokens else (self.batch, view.width)
        return torch.empty(shape, dtype=self.target.dtype, device=self.target.device)

    def __call__(self, images: Tensor) -> Tensor:
        self.first(images)()
        self._run_rest()
        return self.out.clone()


def _allocate(views: Sequence[View], target: Target, batch: int) -> dict[str, Tensor]:
    """One flat buffer a name, as large as its largest view; zeros, so that what no one writes is defined."""
    sizes: dict[str, int] = {}
    for view in views:
        if view.buffer not in ("images", "out"):
            elements = view.tokens * (target.pitch(view.width) if view.width else 1)
            sizes[view.buffer] = max(sizes.get(view.buffer, 0), batch * elements)
    return {
        name: torch.zeros(
            size, dtype=torch.float32 if name.startswith("scores") else target.dtype, device=target.device
        )
        for name, size in sizes.items()
    }


class Engine:
    """Programs by input shape, in a bounded least-recently-used cache; weights are shared between them.

    Calls from several threads are safe: they take turns on the buffers, and each output belongs to its caller.
    """

    def __init__(self, make_plan: Callable[[tuple[int, int]], Plan], target: Target, max_programs: int = 8) -> None:
        self.make_plan, self.target, self.max_programs = make_plan, target, max_programs
        self.packed: OrderedDict[tuple[int, int], PackedPlan] = OrderedDict()
        self.programs: OrderedDict[ShapeKey, Program] = OrderedDict()
        self.lock = threading.Lock()

    def program(self, key: ShapeKey) -> Program:
        """The program for an input shape, made now if need be. The caller holds the lock."""
        if key in self.programs:
            self.programs.move_to_end(key)
            return self.programs[key]
        batch, *size = key
        img_size = (size[0], size[1])
        if img_size not in self.packed:
            self.packed[img_size] = PackedPlan.of(self.make_plan(img_size), self.target)
        program = Program(self.packed[img_size], self.target, batch)
        self.programs[key] = program
        while len(self.programs) > self.max_programs:
            self.programs.popitem(last=False)
        alive = {key[1:] for key in self.programs}
        for size_ in [s for s in self.packed if s not in alive]:
            del self.packed[size_]
        return program

    def __call__(self, images: Tensor) -> Tensor:
        with self.lock:
            program = self.program((images.shape[0], images.shape[2], images.shape[3]))
            return program(images)
