"""Whether a PrunedViT still is what its spec says: what runs by the spec knows nothing of the modules."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from ..errors import CheckpointError
from .parts import kind_of, patch_refusal
from .tensors import match_shapes, shapes_of
from .vit import PrunedViT

_RATES = (nn.Dropout, DropPath, PatchDropout)  # a spec says nothing of them
_NOT_IN_A_SPEC = {"training", "attn_drop", "fused_attn"}


def changed_refusal(model: PrunedViT) -> str | None:
    """Why a model may compute something else than a fresh one of its spec with its tensors, its hooks aside.

    Modules are compared by type, attributes and buffers; dropout and drop-path are free.
    """
    if kind_of(model) is not PrunedViT:
        return f"{type(model).__name__}: expected a PrunedViT itself, since a subclass may compute something else"
    found = dict(model.named_modules(remove_duplicate=False))
    built = PrunedViT(model.spec, device="meta")
    for name, wanted in built.named_modules():
        module = found.pop(name, None)
        if module is None:
            return f"{name} is missing: expected a {_kind(wanted).__name__} as the spec has"
        reason = _module_refusal(name, module, wanted) if name else None
        if reason is not None:
            return reason
    if found:
        return f"{next(iter(found))}: expected no such module of this spec"
    try:
        match_shapes(shapes_of(built), shapes_of(model), "the model")
    except CheckpointError as error:
        return str(error)
    return None


def _module_refusal(name: str, module: nn.Module, wanted: nn.Module) -> str | None:
    kind, wanted_kind = _kind(module), _kind(wanted)
    if kind is not wanted_kind:
        return f"{name} is {kind.__name__}: expected {wanted_kind.__name__} as the spec has"
    if kind is nn.Identity:
        return None
    reason = patch_refusal(kind)
    if reason is not None:
        return reason
    public = {key: value for key, value in vars(wanted).items() if not key.startswith("_")}
    for key, value in {**public, **wanted._buffers}.items():
        now = getattr(module, key, None)
        if key not in _NOT_IN_A_SPEC and not _same(now, value):
            return f"{name}.{key} is {now!r:.60}: expected {value!r:.60} as the spec has"
    return None


def _kind(module: nn.Module) -> type[nn.Module]:
    kind = kind_of(module)
    return nn.Identity if kind in _RATES else kind


def _same(now: Any, wanted: Any) -> bool:
    if isinstance(now, Tensor) and isinstance(wanted, Tensor):
        # a model on the meta device has no values to differ
        return now.shape == wanted.shape and (now.is_meta or torch.equal(now.cpu(), wanted.cpu()))
    return not isinstance(now, Tensor) and bool(now == wanted)
