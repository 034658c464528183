"""What a model is made of, asked by whoever computes it another way: conversion here, kernels in ``nn``.

A module is known by its exact type, since a subclass may compute something else; by nobody who listens to it and may
change what passes; and by methods that nobody has replaced, neither its own nor its class's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from timm.layers import GELU, DropPath, GELUTanh, LayerNorm, LayerScale, Mlp, PatchDropout, PatchEmbed, QuickGELU
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn


class Part(NamedTuple):
    """A submodule by name, and the types that it may have."""

    name: str
    module: nn.Module
    types: tuple[type[nn.Module], ...]


LINEAR, IDENTITY = (nn.Linear,), (nn.Identity,)
DROPOUT = (nn.Dropout, nn.Identity)
PATH = (DropPath, nn.Identity)
NORM = (nn.LayerNorm, LayerNorm)
SCALE = (LayerScale, nn.Identity)
ACTS = (nn.GELU, GELU, GELUTanh, QuickGELU, nn.ReLU)
MLP = (Mlp,)
VITS = (VisionTransformer, VisionTransformerDistilled)

_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


def methods_of(kind: type[nn.Module]) -> list[tuple[type[nn.Module], str, Any]]:
    """What a class computes with now: itself, a method's name, and the method."""
    return [(kind, name, getattr(kind, name)) for name in _METHODS if hasattr(kind, name)]


_KINDS = (*LINEAR, *DROPOUT, *PATH, *NORM, *SCALE, *ACTS, *MLP, *VITS, nn.Conv2d, PatchDropout, PatchEmbed)
_AS_IMPORTED = {kind: methods_of(kind) for kind in (*_KINDS, Attention, Block)}


def patch_refusal(kind: type[nn.Module]) -> str | None:
    """Why a class may compute something else than it did when it was imported."""
    for _, name, method in _AS_IMPORTED.get(kind, ()):
        if getattr(kind, name) is not method:
            return f"{kind.__name__}.{name} is replaced, for all"
    return None


def part_refusal(part: Part) -> str | None:
    """Why a submodule may compute something else than its types do."""
    name, module, types = part
    if kind_of(module) not in types:
        return f"{name} is {_named(kind_of(module), types)}: expected {' or '.join(_short(types))}"
    if len(module._forward_hooks) or len(module._forward_pre_hooks):
        return f"{name} has a forward hook"
    own = own_methods(module)
    return f"{name}.{own[0]} is replaced" if own else patch_refusal(kind_of(module))


def first_refusal(parts: Iterable[Part]) -> str | None:
    for part in parts:
        reason = part_refusal(part)
        if reason is not None:
            return reason
    return None


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Its type, or what it was before ``prunevit.accelerate`` gave it another that computes the same."""
    kind = type(module)
    # no inherited answer: a class made from an accelerated one may compute something else
    eager: type[nn.Module] = vars(kind).get("runs_without", kind)
    return eager


def _named(kind: type, types: Iterable[type]) -> str:
    """A class's name, with its module where the name alone would be one that is expected."""
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ in _short(types) else kind.__name__


def _short(types: Iterable[type]) -> list[str]:
    return list(dict.fromkeys(kind.__name__ for kind in types))


def own_methods(module: nn.Module) -> list[str]:
    """The methods of its class that a module has others of for itself."""
    return [key for key in module.__dict__ if callable(getattr(type(module), key, None))]


def made_from_ours(module: nn.Module) -> bool:
    """Was its class made from one that ``prunevit.accelerate`` gave it?"""
    kind = type(module)
    return hasattr(kind, "runs_without") and "runs_without" not in vars(kind)


def replaced_refusal(model: nn.Module) -> str | None:
    """Why a module of the tree may not do what its class does: a method of its own."""
    for name, module in model.named_modules():
        own = own_methods(module)
        if own:
            return f"{name or type(module).__name__}.{own[0]} is replaced"
    return None


def hooks_refusal(model: nn.Module) -> str | None:
    """Why what a module of the tree takes or gives may be changed on its way."""
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name or type(module).__name__} has a forward hook, which may change what it computes: remove it"
    return None


def stem_and_head_refusal(model: Any) -> str | None:
    """Why what stands around a model's blocks may not be what timm puts there."""
    optional = (*NORM, nn.Identity)
    parts = [
        Part("pos_drop", model.pos_drop, DROPOUT),
        Part("patch_drop", model.patch_drop, (PatchDropout, nn.Identity)),
        Part("patch_embed.proj", model.patch_embed.proj, (nn.Conv2d,)),
        Part("patch_embed.norm", model.patch_embed.norm, optional),
        Part("blocks", model.blocks, (nn.Sequential,)),
        *(Part(name, getattr(model, name), optional) for name in ("norm_pre", "norm", "fc_norm")),
        Part("head_drop", model.head_drop, DROPOUT),
        *(Part(n, getattr(model, n), LINEAR + IDENTITY) for n in ("head", "head_dist") if hasattr(model, n)),
    ]
    proj = model.patch_embed.proj
    reason = first_refusal(parts)
    plain = (model.patch_embed.patch_size, (0, 0), (1, 1), 1, "zeros")
    if reason is None and (proj.stride, proj.padding, proj.dilation, proj.groups, proj.padding_mode) != plain:
        return "patch_embed.proj is no plain cut into patches: expected its patches side by side, without padding"
    return reason


def attention_parts(attn: Any, name: str) -> list[Part]:
    """Of timm's attention or prunevit's, whose dropout of scores is a number."""
    norms = [norm for norm in ("q_norm", "k_norm", "norm") if getattr(attn, norm, None) is not None]
    return [
        Part(f"{name}qkv", attn.qkv, LINEAR),
        Part(f"{name}proj", attn.proj, LINEAR),
        Part(f"{name}proj_drop", attn.proj_drop, DROPOUT),
        *([Part(f"{name}attn_drop", attn.attn_drop, DROPOUT)] if isinstance(attn.attn_drop, nn.Module) else []),
        *(Part(f"{name}{norm}", getattr(attn, norm), IDENTITY) for norm in norms),
    ]


def mlp_parts(mlp: Any, name: str) -> list[Part]:
    return [
        Part(f"{name}fc1", mlp.fc1, LINEAR),
        Part(f"{name}act", mlp.act, ACTS),
        Part(f"{name}drop1", mlp.drop1, DROPOUT),
        Part(f"{name}norm", mlp.norm, IDENTITY),
        Part(f"{name}fc2", mlp.fc2, LINEAR),
        Part(f"{name}drop2", mlp.drop2, DROPOUT),
    ]


def half_parts(block: Any, half: str, name: str = "") -> list[Part]:
    """What stands around one of a block's two sublayers."""
    return [
        Part(f"{name}norm{half}", getattr(block, "norm" + half), NORM),
        Part(f"{name}ls{half}", getattr(block, "ls" + half), SCALE),
        Part(f"{name}drop_path{half}", getattr(block, "drop_path" + half), PATH),
    ]
