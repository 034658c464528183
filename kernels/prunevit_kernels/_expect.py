"""Contracts, checked once at the door of each op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .target import Target


class ContractError(ValueError):
    """An argument breaks an op's contract. The message says what was expected and what came."""


def expect(condition: bool, what: str, *, got: object, want: object = None) -> None:
    """Raise :class:`ContractError` unless ``condition`` holds.

    ``what`` completes the sentence "expected …", for example "qkv to be as wide as its head table".
    """
    if not condition:
        wanted = "" if want is None else f" ({want})"
        raise ContractError(f"expected {what}{wanted}, got {got}")


def expect_channels(name: str, channels: Sequence[int] | None, embed_dim: int) -> int:
    """Channel indices are distinct and lie in the residual stream. Returns how many there are; None means all."""
    if channels is None:
        return embed_dim
    inside = all(0 <= channel < embed_dim for channel in channels)
    expect(inside and len(set(channels)) == len(channels), f"distinct {name} below", got=channels, want=embed_dim)
    return len(channels)


def expect_vector(name: str, vector: Tensor | None, size: int) -> None:
    if vector is not None:
        expect(vector.shape == (size,), f"{name} of shape", got=tuple(vector.shape), want=(size,))


def expect_linear(name: str, weight: Tensor, bias: Tensor | None, shape: tuple[int | None, int | None]) -> None:
    """weight [out, in] with at least one row and column, bias [out] or None."""
    fits = weight.dim() == 2 and min(weight.shape) >= 1
    fits = fits and all(want in (None, size) for want, size in zip(shape, weight.shape, strict=True))
    expect(fits, f"{name} of shape", got=tuple(weight.shape), want=shape)
    expect_vector(f"the bias of {name}", bias, weight.shape[0])


def expect_affine(name: str, norm: Tensor | None, embed_dim: int) -> None:
    """A norm's weight and bias as one tensor [2, E], or None."""
    if norm is not None:
        expect(norm.shape == (2, embed_dim), f"{name} of shape", got=tuple(norm.shape), want=(2, embed_dim))


def expect_buffer(
    name: str, tensor: Tensor, shape: Sequence[int | None], target: Target, dtype: torch.dtype | None = None
) -> None:
    """A buffer of ``shape`` (None: any size) whose last dimension is contiguous; rows may have a pitch."""
    expect(isinstance(tensor, Tensor), f"{name} to be a tensor", got=type(tensor).__name__)
    fits = tensor.dim() == len(shape) and min(tensor.shape) >= 1
    fits = fits and all(want in (None, size) for want, size in zip(shape, tensor.shape, strict=True))
    expect(fits, f"{name} of shape", got=tuple(tensor.shape), want=tuple(shape))
    wanted = dtype or target.dtype
    expect(tensor.dtype == wanted, f"{name} of dtype", got=tensor.dtype, want=wanted)
    there = tensor.device.type == target.device.type and target.device.index in (None, tensor.device.index)
    expect(there, f"{name} on device", got=tensor.device, want=target.device)
    expect(
        tensor.shape[-1] == 1 or tensor.stride(-1) == 1, f"{name} with a contiguous last dimension", got=tensor.stride()
    )


def matrix_of(name: str, tensor: Tensor) -> tuple[int, int]:
    """How many rows a [B, N, C] buffer has, and their pitch in elements.

    One token an image (``x[:, :1]``) is a matrix of B rows too, with a pitch of a whole image: the last block
    under class-token pooling computes no other row.
    """
    b, n, _ = tensor.shape
    if n == 1:
        return b, tensor.stride(0)
    even = b == 1 or tensor.stride(0) == n * tensor.stride(1)
    expect(even, f"{name} to have evenly spaced rows", got=tensor.stride(), want=f"{n} rows an image")
    return b * n, tensor.stride(1)
