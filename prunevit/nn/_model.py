"""A whole vision transformer on kernels: images to logits by the runtime's plan, on the model's live parameters.

Only a plain call in eager mode runs so, on a CPU; every other one goes through the model's own ``forward``, where its
blocks run on kernels one by one. What the plan leaves out is what nobody can see: no PyTorch op between the kernels,
whose threads would spin on the cores that the kernels need, and none of the last block's rows that pooling drops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunevit_kernels import Target
from prunevit_kernels.library import packs, target_of

from ..errors import CheckpointError, UnsupportedModel
from ..models.block import act_of
from ..models.from_timm import spec_of
from ..models.parts import kind_of, replaced_refusal, stem_and_head_refusal
from ..models.tensors import check_shapes
from ..models.vit import PrunedViT
from ..runtime.engine import Engine
from ..runtime.plan import make_plan
from ..spec import ViTSpec
from ._attention import heads_of
from ._block import BlockOnKernels
from ._module import KernelModule, tensors_refusal, watched
from ._snapshot import Known

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
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)

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


def _look(model: Any) -> _Found:
    sizes = [p.shape for p in model.parameters()]
    try:
        spec = _spec_of(model)
    except (UnsupportedModel, CheckpointError) as error:
        return _Found(None, str(error), sizes)
    reason = _parts_reason(model) or _spec_reason(model, spec)
    return _Found(None if reason else _Shape(spec), reason, sizes)


_structures: Known[_Found] = Known(_look)


def _spec_of(model: Any) -> ViTSpec:
    if not isinstance(model, PrunedViT):
        return spec_of(model)
    check_shapes(model.spec, {name: tuple(t.shape) for name, t in model.state_dict().items()}, "the model")
    return model.spec


def _kind(module: nn.Module) -> type:
    kind = kind_of(module)
    return nn.Identity if kind is nn.Dropout or kind.__name__ in ("DropPath", "PatchDropout") else kind


def _parts_reason(model: Any) -> str | None:
    """Why the modules around the blocks, or the tree as a whole, are not what a spec says of them."""
    for name, module in model.named_modules():
        if module.training:
            return f"{name or 'the model'} is in training mode"
    if len(list(model.named_modules(remove_duplicate=False))) != len(list(model.named_modules())):
        return "a module occurs twice"  # and its parameters under one of their names
    return replaced_refusal(model) or stem_and_head_refusal(model)


def _spec_reason(model: Any, spec: ViTSpec) -> str | None:
    """Why the modules do not compute what the spec says, or the plan cannot take their live tensors."""
    if spec.attn_pool is not None:
        return "attention pooling runs in PyTorch"
    if model.global_pool != spec.global_pool:
        return f"global_pool is {model.global_pool!r}, and the spec has {spec.global_pool!r}"
    if isinstance(model, PrunedViT):
        built = PrunedViT(spec, device="meta")
        wanted = {name: _kind(module) for name, module in built.named_modules()}
        if {name: _kind(module) for name, module in model.named_modules()} != wanted:
            return "the modules are not those of the spec"
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm) and module.eps != spec.norm_eps:
            return f"{name}.eps is {module.eps}, and the spec has {spec.norm_eps}"
    for index, (module, block) in enumerate(zip(model.blocks, spec.blocks, strict=True)):
        if not isinstance(module, BlockOnKernels):
            return f"blocks.{index} is a {type(module).__name__}"
        reason = module._look() or _block_reason(module, block, spec)
        if reason is not None:
            return f"blocks.{index}: {reason}"
    return None


def _block_reason(module: Any, block: Any, spec: ViTSpec) -> str | None:
    if (block.attn_reads, block.attn_writes, block.mlp_reads, block.mlp_writes) != (None,) * 4:
        return "it reads or writes some of the channels"  # by buffers, which are no part of a plan's weights
    if block.qk_dims:
        qk_dims, v_dims, scale = heads_of(module.attn)
        if (tuple(qk_dims), tuple(v_dims), scale) != (block.qk_dims, block.v_dims, block.attn_scale):
            return "its heads are not those of the spec"
    if block.mlp_dim and act_of(module.mlp.act) != spec.act:
        return f"its activation is {act_of(module.mlp.act)}, and the spec has {spec.act}"
    if getattr(module, "select", None) != block.select:
        return "its token selection is not the spec's"
    return None


def _run(
    x: Tensor, shape: _Shape, names: list[str], weights: tuple[Tensor, ...], backend: str, trust_versions: bool
) -> Tensor:
    """By the engine that was packed from these weights: it plans for each image size that it meets."""

    def lay_out(target: Target, *copies: Tensor) -> Engine:
        tensors = dict(zip(names, copies))
        return Engine(lambda size: make_plan(shape.spec, tensors, target, size), target, MAX_PROGRAMS)

    pack = packs.get(("vit", shape), weights, target_of(x, backend), lay_out, trust_versions=trust_versions)
    engine: Engine = pack.value
    with torch.no_grad():
        return engine(x.detach().contiguous())


MODELS: tuple[type[nn.Module], ...] = (VisionTransformer, VisionTransformerDistilled, PrunedViT)
