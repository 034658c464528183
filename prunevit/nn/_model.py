"""A whole vision transformer on kernels: images to logits by the runtime's plan, on the model's live parameters.

Only a plain call in eager mode runs so, on a CPU; every other one goes through the model's own ``forward``, where its
blocks run on kernels one by one. What the plan leaves out is what nobody can see: no PyTorch op between the kernels,
whose threads would spin on the cores that the kernels need, and none of the last block's rows that pooling drops.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prunevit_kernels import Target
from prunevit_kernels.library import packs, target_of

from ..errors import UnsupportedModel
from ..models.as_built import changed_refusal
from ..models.from_timm import spec_of
from ..models.parts import VITS, replaced_refusal, stem_and_head_refusal
from ..models.vit import PrunedViT
from ..runtime.engine import Engine
from ..runtime.plan import make_plan
from ..spec import ViTSpec
from ._block import BlockOnKernels
from ._module import KernelModule, given, tensors_refusal, watched
from ._snapshot import Known, Snapshot

MAX_PROGRAMS = 4  # input shapes that a pack keeps buffers for


class _Shape:
    """A spec as a part of a key: hashed once."""

    def __init__(self, spec: ViTSpec) -> None:
        self.spec, self._hash = spec, hash(spec)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Shape) and self.spec == other.spec)


class _Found(NamedTuple):
    """What a model's modules compute, or why that is not one plan; and its tensors' shapes."""

    shape: _Shape | None
    reason: str | None
    sizes: list[torch.Size]


class ModelOnKernels(KernelModule):
    """A vision transformer, images [B, C, H, W] -> logits, on kernels."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        found = self._whole(x, attn_mask, is_causal)
        if not isinstance(found, str):
            return _run(x, *found, self.kernel_options.backend, self.kernel_options.check == "versions")
        return super().forward(x, **given(attn_mask, is_causal))

    def refusal(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        """Why a call runs block by block, in which case each block says what it can; None if it runs as one plan."""
        found = self._whole(x, attn_mask, is_causal)
        return found if isinstance(found, str) else None

    def _whole(
        self, x: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> str | tuple[_Shape, list[str], tuple[Tensor, ...]]:
        if not isinstance(x, Tensor) or x.dim() != 4:
            return "x is no batch of images"
        reason = watched(x) or self._call_refusal(x, attn_mask, is_causal)
        if reason is None and x.device.type != "cpu":
            reason = "a GPU runs block by block"
        if reason is not None:
            return reason
        snapshot, (shape, reason, sizes) = _structures(self)
        if shape is None or snapshot.hooked:
            return reason or "a module inside has a forward hook"
        weights = snapshot.parameters()
        if set(map(type, weights)) != {nn.Parameter}:
            return "a weight is no plain parameter"
        if [w.shape for w in weights] != sizes:
            return "a weight has changed its shape"
        reason = _image_refusal(shape.spec, x) or tensors_refusal(x, weights)
        return reason or (shape, snapshot.names, weights)


def _image_refusal(spec: ViTSpec, x: Tensor) -> str | None:
    """The model's own forward says what is wrong with images that do not fit."""
    size = (x.shape[2], x.shape[3])
    whole_patches = all(s >= p and s % p == 0 for s, p in zip(size, spec.patch_size))
    fits = whole_patches if spec.dynamic_img_size else size == spec.img_size
    return None if fits and x.shape[1] == spec.in_chans else f"images of shape {tuple(x.shape)}"


# -- the model as a spec ---------------------------------------------------------------------------------------------


def _look(model: Any, snapshot: Snapshot) -> _Found:
    sizes = [p.shape for p in snapshot.parameters()]
    try:
        spec = model.spec if isinstance(model, PrunedViT) else spec_of(model)
    except UnsupportedModel as error:
        return _Found(None, str(error), sizes)
    reason = changed_refusal(model) if isinstance(model, PrunedViT) else None
    reason = reason or _parts_reason(model) or _plan_reason(model, spec)
    if reason is None and set(snapshot.names) != set(model.state_dict()):
        reason = "a weight is a buffer"  # and not among those that a pack is looked up by
    return _Found(None if reason else _Shape(spec), reason, sizes)


_structures: Known[_Found] = Known(_look)


def _parts_reason(model: Any) -> str | None:
    """Why the modules around the blocks, or the tree as a whole, are not what a spec says of them."""
    for name, module in model.named_modules():
        if module.training:
            return f"{name or 'the model'} is in training mode"
    if len(list(model.named_modules(remove_duplicate=False))) != len(list(model.named_modules())):
        return "a module occurs twice"  # and its parameters under one of their names
    return replaced_refusal(model) or stem_and_head_refusal(model)


def _plan_reason(model: Any, spec: ViTSpec) -> str | None:
    """Why no plan computes what the modules do, or it cannot take their live tensors."""
    if spec.attn_pool is not None:
        return "attention pooling runs in PyTorch"
    for index, (module, block) in enumerate(zip(model.blocks, spec.blocks, strict=True)):
        if not isinstance(module, BlockOnKernels):
            return f"blocks.{index} is a {type(module).__name__}"
        reason = module._look()
        if reason is None and (block.attn_reads, block.attn_writes, block.mlp_reads, block.mlp_writes) != (None,) * 4:
            reason = "it reads or writes some of the channels"  # by buffers, which are no part of a plan's weights
        if reason is not None:
            return f"blocks.{index}: {reason}"
    return None


def _run(
    x: Tensor, shape: _Shape, names: list[str], weights: tuple[Tensor, ...], backend: str, trust_versions: bool
) -> Tensor:
    """By the engine that was packed from these weights: it plans for each image size that it meets."""

    def lay_out(target: Target, *copies: Tensor) -> Engine:
        tensors = dict(zip(names, copies))
        return Engine(partial(make_plan, shape.spec, tensors, target), target, MAX_PROGRAMS)

    pack = packs.get(("vit", shape), weights, target_of(x, backend), lay_out, trust_versions=trust_versions)
    engine: Engine = pack.value
    with torch.no_grad():
        return engine(x.detach().contiguous())


MODELS: tuple[type[nn.Module], ...] = (*VITS, PrunedViT)
