"""Surgery: the compact module of a dense one and a plan. Every kept weight is copied, none is multiplied by zero."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from ..errors import PruningError, expect
from ..models import PrunedViT
from ..models.block import RaggedAttention
from ..models.from_timm import as_pruned
from .groups import Atoms
from .plan import Plan, same_shape

_NORM_WEIGHT = re.compile(r"(^|\.)(norm|norm1|norm2|norm_pre|fc_norm)\.weight$")


def compact(model: nn.Module, plan: Plan) -> PrunedViT:
    """The module that a plan leaves, on the model's device and in its dtype; ``model`` is left as it is.

    Its ``plan`` maps to the indices of the first dense model, through however many plans. The softmax scale stays the
    dense head's; dropout rates and the switches of training are those of ``model``. Raises :class:`PruningError` where
    the plan was made for another shape.
    """
    dense = as_pruned(model)
    fits = same_shape(dense.spec, plan.dense)
    expect(fits, PruningError, "a plan made for a model of this shape", got=f"one of width {plan.dense.embed_dim}")
    before, left = Plan.of(dense), plan.spec()
    weights = dense.state_dict()
    # no initialisation, which would draw on the caller's chance: every tensor is a copy of the dense model's
    small = PrunedViT(dense.spec.replace(embed_dim=left.embed_dim, blocks=left.blocks), device="meta")
    kept = dict(kept_indices(plan))
    gains = set(norm_weights(plan))
    state = {}
    for name in small.state_dict():
        weight = weights[name]
        for axis, index in enumerate(kept.get(name, ())):
            if index is not None:
                weight = weight.index_select(axis, index.to(weight.device))
        state[name] = weight * plan.norm_gain if name in gains else weight.clone()
    small.load_state_dict(state, assign=True)
    small.to(weights["patch_embed.proj.weight"].device)  # lists of channels are no part of the state
    small.plan = before.then(plan).to_dict()
    small.provenance, small.pretrained_cfg = dict(dense.provenance), dict(dense.pretrained_cfg)
    _copy_training(dense, small)
    return small.train(dense.training)


def _copy_training(dense: PrunedViT, small: PrunedViT) -> None:
    """Dropout, distilled training and gradient checkpointing, as a training run has set them."""
    small.distilled_training, small.grad_checkpointing = dense.distilled_training, dense.grad_checkpointing
    there = dict(small.named_modules())
    for name, module in dense.named_modules():
        if isinstance(module, PatchDropout) and small.selects:
            continue  # a model that selects a static count of patches drops none by chance
        if name in there and isinstance(module, nn.Dropout | DropPath | PatchDropout):
            small.set_submodule(name, deepcopy(module))
        if name in there and isinstance(module, RaggedAttention):
            there[name].attn_drop = module.attn_drop


def kept_indices(plan: Plan) -> Iterator[tuple[str, tuple[Tensor | None, ...]]]:
    """For each prunable parameter, which indices of each axis are kept (None: all)."""
    kept = plan.kept_atoms()
    for name, axes in Atoms.of(plan.dense).axes().items():
        yield name, tuple(None if ids is None else torch.nonzero(kept[ids]).squeeze(1) for ids in axes)


def norm_weights(plan: Plan) -> Iterator[str]:
    """The names of the LayerNorm weights over the residual stream."""
    return (name for name in Atoms.of(plan.dense).axes() if _NORM_WEIGHT.search(name))
