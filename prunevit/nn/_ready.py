"""A block that runs on kernels whole, with all that its modules say of it found out once, for as long as it holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.block import act_of
from ..spec import Act
from ._attention import Heads, heads_of, widths_refusal
from ._snapshot import Known, Snapshot

_ATTENTION = ("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight", "attn.proj.bias")
_MLP = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")


class Ready(NamedTuple):
    """The arguments of ``library.block`` but for x and the tensors, and where among the parameters those are."""

    embed_dim: int
    sizes: list[torch.Size]
    attention: list[int | None]
    mlp: list[int | None]
    heads: Heads
    act: Act
    eps: list[float]


def tensors(weights: Sequence[Tensor], places: Sequence[int | None]) -> list[Tensor | None]:
    """Half a block's tensors in ``library.block``'s order: what it reads and writes is the whole stream."""
    return [*(None if at is None else weights[at] for at in places), None, None]


def _prepare(block: Any, parts: Snapshot) -> Ready | None:
    """None for a block that does not always run whole: then it is asked anew at each call, and says why."""
    if not (block._attends and block._has_mlp) or block._look() is not None or getattr(block, "selects", False):
        return None
    embed_dim = block.norm1.normalized_shape[0]
    fits = block.norm1.normalized_shape == block.norm2.normalized_shape == (embed_dim,)
    if not fits or widths_refusal(block.attn, "") or block._gamma_refusal("1") or block._gamma_refusal("2"):
        return None
    if any(channels is not None for channels in block._buffers.values()):
        return None
    halves = ((*_ATTENTION, "ls1.gamma"), (*_MLP, "ls2.gamma"))
    names = parts.names
    if set(names) != {name for name in chain(*halves) if _weight(block, name) is not None}:
        return None  # one is a buffer, or a plain tensor
    attention, mlp = ([names.index(name) if name in names else None for name in half] for half in halves)
    sizes = [parameter.shape for parameter in parts.parameters()]
    eps = [block.norm1.eps, block.norm2.eps]
    return Ready(embed_dim, sizes, attention, mlp, heads_of(block.attn), act_of(block.mlp.act), eps)


def _weight(block: Any, name: str) -> Any:
    """What a submodule computes with under this name, parameter or not; None if nothing."""
    owner, _, leaf = name.rpartition(".")
    return getattr(block.get_submodule(owner), leaf, None)


ready: Known[Ready | None] = Known(_prepare)
