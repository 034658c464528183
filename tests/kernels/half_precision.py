"""What every 16-bit kernel is checked for, whether the interpreter runs it or a GPU.

Truth is the fp64 reference on the weights and inputs as rounded to the dtype under test. Ours may be wrong by twice
what eager PyTorch in that dtype is wrong, plus eps · max|truth|, as maximum and as RMS. Every buffer lies in storage
that was filled with NaN, rows have a pitch, and what is not a buffer's own must be there unchanged afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from prunevit_kernels import HeadTable, Launch, Op, RaggedAttention, Target, TokenScores

Role = Literal["read", "written", "updated"]


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A buffer of an op: its shape, what the op does with it, and a dtype where it is not the target's."""

    shape: tuple[int, ...]
    role: Role
    dtype: torch.dtype | None = None
    fill: Callable[[Tensor], Tensor] = lambda values: values
    """Makes standard values, shifted to a mean of 3, into what the op expects."""


@dataclasses.dataclass(frozen=True)
class Case:
    op: Op
    buffers: Sequence[Buffer]


def allocate(buffer: Buffer, target: Target, values: Tensor | None) -> tuple[Tensor, Tensor]:
    """The buffer and the storage around it: NaN, a guard band of 64 before and after, rows with a pitch."""
    dtype = buffer.dtype or target.dtype
    *rows, width = buffer.shape
    pitch = width if len(buffer.shape) == 4 else target.pitch(width) + 8  # images are contiguous
    storage = torch.full((64 + math.prod(rows) * pitch + 64,), math.nan, dtype=dtype, device=target.device)
    strides = [pitch * math.prod(rows[i + 1 :]) for i in range(len(rows))]
    view = storage.as_strided(buffer.shape, (*strides, 1), 64)
    if values is not None:
        view.copy_(values)
    return view, storage


def draw(case: Case, target: Target, seed: int = 0) -> list[Tensor]:
    """fp64 values of every buffer that is read, rounded to its dtype."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for buffer in case.buffers:
        values = buffer.fill(torch.randn(buffer.shape, generator=generator, dtype=torch.float64) + 3)
        drawn.append(values.to(buffer.dtype or target.dtype).double())
    return drawn


def reference_on(op: Op, case: Case, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What the reference writes, computed in ``dtype``."""
    buffers = []
    for buffer, values in zip(case.buffers, inputs):
        own = dtype if dtype == torch.float64 or buffer.dtype is None else buffer.dtype
        buffers.append(values.to(own) if buffer.role != "written" else torch.full_like(values, math.nan, dtype=own))
    with torch.no_grad():
        op.reference(*buffers)
    return [tensor.double() for tensor, buffer in zip(buffers, case.buffers) if buffer.role != "read"]


def changed(op: Op, change: Callable[[Tensor], Tensor]) -> Any:
    """The op with each of its tensors changed."""
    fields = {f.name: getattr(op, f.name) for f in dataclasses.fields(op)}
    return dataclasses.replace(op, **{k: change(v) for k, v in fields.items() if isinstance(v, Tensor)})


def rounded(op: Op, dtype: torch.dtype) -> Any:
    """The op with its weights rounded to ``dtype``, in fp64."""
    return changed(op, lambda weight: weight.to(dtype).double())


def assert_as_good_as_eager(
    ours: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, units: int | None = None
) -> None:
    # the kernels are made for 16-bit inputs and fp32 sums; fp32 inputs, for the interpreter alone, leave the sums no
    # room: subtracting a mean of three deviations from them costs a few units more than subtracting it before
    units = units or (8 if dtype == torch.float32 else 1)
    slack = units * torch.finfo(dtype).eps * truth.abs().max().item()
    assert torch.isfinite(ours).all(), "not finite"
    for name, measure in {"max": lambda e: e.abs().max(), "rms": lambda e: e.square().mean().sqrt()}.items():
        allowed = 2 * measure(eager - truth).item() + slack
        assert measure(ours - truth).item() <= allowed, (
            f"{name} error {measure(ours - truth).item():.3g} > {allowed:.3g}"
        )


def place(case: Case, target: Target, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Fresh buffers with the inputs in them, and the storage around each."""
    pairs = [
        allocate(buffer, target, None if buffer.role == "written" else values)
        for buffer, values in zip(case.buffers, inputs)
    ]
    return [view for view, _ in pairs], [storage for _, storage in pairs]


def check(
    case: Case, target: Target, run: Callable[[Launch], None] = lambda launch: launch(), units: int | None = None
) -> None:
    """Run the op as packed for ``target`` and hold it to the rule. ``run`` may launch it in some other way."""
    inputs = draw(case, target)
    views, storages = place(case, target, inputs)
    before = [storage.clone() for storage in storages]
    launch = case.op.pack(target).bind(*views)
    for storage, saved in zip(storages, before):
        assert same_bits(storage, saved), "bind wrote to a buffer"
    run(launch)

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(target.device)

    inputs = list(map(there, inputs))
    truths = reference_on(changed(rounded(case.op, target.dtype), there), case, inputs, torch.float64)
    eagers = reference_on(changed(case.op, lambda w: w.to(target.device, target.dtype)), case, inputs, target.dtype)
    written = [view for view, buffer in zip(views, case.buffers) if buffer.role != "read"]
    for view, eager, truth in zip(written, eagers, truths):
        assert_as_good_as_eager(view.double(), eager, truth, target.dtype, units)
    for view, storage, saved, buffer in zip(views, storages, before, case.buffers):
        if buffer.role != "read":
            view.copy_(saved.as_strided(view.shape, view.stride(), view.storage_offset()))
        assert same_bits(storage, saved), "wrote outside the buffer, or to one that is only read"


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def packed_rows(heads: HeadTable) -> Callable[[Tensor], Tensor]:
    """Makes qkv rows: scores of a few units, zeros in the gaps of q and k, NaN in those of v."""

    def fill(values: Tensor) -> Tensor:
        rows = torch.full_like(values, math.nan)
        rows[..., : min(heads.v)] = 0
        for h, (dqk, dv) in enumerate(zip(heads.qk_dims, heads.v_dims)):
            for offsets, dim, factor in ((heads.q, dqk, 1 / math.sqrt(dqk)), (heads.k, dqk, 1), (heads.v, dv, 1)):
                columns = slice(offsets[h], offsets[h] + dim)
                rows[..., columns] = values[..., columns] * factor
        return rows

    return fill


def attention_case(qk: Sequence[int], v: Sequence[int], b: int, n: int, queries: int | None = None) -> Case:
    heads = HeadTable.packed(qk, v, align=8)
    qkv = Buffer((b, n, heads.width), "read", fill=packed_rows(heads))
    return Case(RaggedAttention(heads), [qkv, Buffer((b, queries or n, heads.out_width), "written")])


def scores_case(
    qk: Sequence[int], b: int, n: int, rule: Literal["max_attention", "class_attention"], add: bool
) -> Case:
    heads = HeadTable.packed(qk, [1] * len(qk), align=8)
    qkv = Buffer((b, n, heads.width), "read", fill=packed_rows(heads))
    scores = Buffer((b, n), "updated" if add else "written", torch.float32)
    return Case(TokenScores(heads, rule, accumulate=add), [qkv, scores])


def weights(*shape: int, seed: int = 1) -> Tensor:
    """Weights of the size that keeps a product's outputs near one, with a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) + 0.3) / math.sqrt(shape[-1])
