"""What the Triton ops share: calls that compile when buffers are bound, and scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic
from weakref import WeakValueDictionary

import torch
import triton
from torch import Tensor

from ._configs import Problem, Tile
from ._expect import expect
from .op import SHAPES, AnyOp
from .target import Launch, Target, in_order
from .units import round_up


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel launch: the kernel, how many programs, its run-time arguments in order, and its constants."""

    kernel: Any
    grid: int | tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    tile: Tile
    problem: Problem

    @property
    def blocks(self) -> tuple[int, int, int]:
        return (self.grid, 1, 1) if isinstance(self.grid, int) else self.grid

    def compile(self) -> Any:
        """Compile the kernel, specialised as the arguments ask, for the active driver's GPU. Nothing runs."""
        return self.kernel.warmup(*self.args, grid=self.blocks, **self.constants, **self._options())

    def load(self) -> partial[None]:
        """The call, compiled and on the GPU: launching it does neither. Its first arguments are the call's."""
        if triton.knobs.runtime.interpret:
            return partial(self.kernel[self.blocks], *self.args, **self.constants)
        compiled = self.compile()
        compiled._init_handles()
        in_order = [self.constants[name] for name in self.kernel.arg_names[len(self.args) :]]
        return partial(compiled[self.blocks], *self.args, *in_order)

    def _options(self) -> dict[str, Any]:
        # fp fusion is set because its default differs between Triton's versions
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": True}
        return {**options, "launch_pdl": True} if self.constants["PDL"] else options


class TritonOp(Generic[AnyOp]):
    """An op packed for Triton kernels. A subclass turns buffers, checked by the op, into the calls that run it."""

    calls: ClassVar[Callable[..., list[Call]]]

    def __init__(self, op: AnyOp, target: Target) -> None:
        self.op, self.target = op.to(SHAPES), target

    def bind(self, *buffers: Tensor) -> Launch:
        return self.launch(self.load(*buffers))

    def load(self, *buffers: Tensor) -> list[partial[None]]:
        """Every call on these buffers, which are checked."""
        self.op.check(self.target, *buffers)
        device = self.target.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # the interpreter
            return [call.load() for call in self.calls(*buffers)]

    def launch(self, loaded: Sequence[Launch]) -> Launch:
        device = self.target.device
        return partial(_on_device, device, loaded) if device.type == "cuda" else in_order(loaded)


def _on_device(device: torch.device, launches: Sequence[Launch]) -> None:
    with torch.cuda.device(device):  # Triton launches on the current device's current stream
        for launch in launches:
            launch()


def expect_rows(name: str, tensor: Tensor) -> None:
    """Rows that 16-byte copies can read: they start on 16 bytes, and have room for a multiple of 8 elements."""
    pitches = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()) if size > 1]
    aligned = tensor.data_ptr() % 16 == 0 and all(pitch % 8 == 0 for pitch in pitches)
    expect(
        aligned,
        f"{name} with rows that start on 16 bytes; allocate it with Target.pitch",
        got=f"strides {tuple(tensor.stride())} at {tensor.data_ptr() % 16} bytes past",
    )
    end = tensor.storage_offset() + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    room = tensor.untyped_storage().nbytes() // tensor.element_size()
    last = end - (tensor.shape[-1] - 1) + round_up(tensor.shape[-1], 8)
    expect(bool(last <= room), f"{name} with storage for the whole pitch of its last row", got=room, want=last)


_scratch: WeakValueDictionary[tuple[torch.device, int], Tensor] = WeakValueDictionary()


def scratch_for(written: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for what an op keeps between its launches.

    It is shared by all ops that write the same buffer: they can never run at the same time, or they would race for
    that buffer. It lives as long as a launch holds it; rows have a pitch of whole 16 bytes.
    """
    pitch = round_up(shape[-1], 8)
    rows = shape[:-1]
    elements = pitch
    for size in rows:
        elements *= size
    key = (written.device, written.data_ptr())
    held = _scratch.get(key)
    if held is None or held.numel() < elements * dtype.itemsize:
        held = torch.empty(elements * dtype.itemsize, dtype=torch.uint8, device=written.device)
        _scratch[key] = held
    view = held[: elements * dtype.itemsize].view(dtype).view(*rows, pitch)[..., : shape[-1]]
    view.held = held  # type: ignore[attr-defined]  # the table is weak: whoever has the view keeps the memory
    return view
