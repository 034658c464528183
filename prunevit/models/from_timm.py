"""A timm ``VisionTransformer`` as a spec and as a PrunedViT. Scope is decided by module types and attributes."""

from __future__ import annotations

import os
from typing import Any

from timm.layers import AttentionPoolLatent, LayerScale, PatchEmbed
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from ..errors import CheckpointError, SpecError, UnsupportedModel
from ..spec import MAX_HEAD_DIM, AttnPoolSpec, BlockSpec, ViTSpec
from .as_built import changed_refusal
from .block import act_of
from .config import pretrained_cfg_of
from .parts import (
    DROPOUT,
    IDENTITY,
    LINEAR,
    MLP,
    NORM,
    VITS,
    Part,
    attention_parts,
    first_refusal,
    half_parts,
    hooks_refusal,
    kind_of,
    mlp_parts,
    patch_refusal,
    replaced_refusal,
    stem_and_head_refusal,
)
from .tensors import check_shapes, shapes_of
from .vit import PrunedViT


def from_timm(model: nn.Module) -> PrunedViT:
    """A timm ``VisionTransformer`` as a PrunedViT with a copy of its weights; the two agree to rounding.

    Dropout rates and ``requires_grad`` are not carried over: they belong to a training run. Raises
    :class:`UnsupportedModel` naming the attribute that no spec describes, or the module that may compute something
    else than its class does: one with a forward hook, or a method replaced.
    """
    spec, state = spec_of(model), model.state_dict()
    _refuse(replaced_refusal(model) or hooks_refusal(model))
    pruned = PrunedViT(spec, device="meta")  # no memory and no initialisation: every tensor is the model's, copied
    pruned.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    pruned.to(state["patch_embed.proj.weight"].device)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    pruned.pretrained_cfg = pretrained_cfg_of(spec, cfg)
    name = cfg.get("architecture")
    if name is not None:
        tag = cfg.get("tag")
        pruned.provenance = {"base_model": f"{name}.{tag}" if tag else name}
    return pruned.train(model.training)


def as_pruned(model: nn.Module) -> PrunedViT:
    """A PrunedViT as it is, or a timm model converted.

    Raises :class:`UnsupportedModel`, also for a PrunedViT that may compute something else than its spec says.
    """
    if not isinstance(model, PrunedViT):
        return from_timm(model)
    _refuse(replaced_refusal(model) or hooks_refusal(model) or changed_refusal(model))
    return model


def spec_of(model: nn.Module) -> ViTSpec:
    """The spec of a timm ``VisionTransformer``. Raises :class:`UnsupportedModel` naming the attribute."""
    if isinstance(model, PrunedViT):
        raise UnsupportedModel("PrunedViT: expected a timm model, got what one becomes; its spec is model.spec")
    if not isinstance(model, nn.Module) or kind_of(model) not in VITS:
        hint = "; prunevit.load reads a checkpoint" if isinstance(model, str | os.PathLike) else ""
        raise UnsupportedModel(
            f"{type(model).__name__}: expected timm's VisionTransformer or VisionTransformerDistilled{hint}"
        )
    _refuse(patch_refusal(kind_of(model)))
    vit: Any = model
    distilled = isinstance(model, VisionTransformerDistilled)
    _refuse(first_refusal([Part("patch_embed", vit.patch_embed, (PatchEmbed,))]))
    if vit.patch_embed.img_size is None:
        raise UnsupportedModel("patch_embed.img_size is None: expected an image size that position embeddings fit")
    if vit.pos_embed is None:
        raise UnsupportedModel("pos_embed is None: expected a learned position embedding")
    norms, pool = _Norms(), vit.attn_pool
    blocks = tuple(_block_of(block, f"blocks.{i}", norms) for i, block in enumerate(vit.blocks))
    _refuse(stem_and_head_refusal(vit))
    fields: dict[str, Any] = {
        "img_size": tuple(vit.patch_embed.img_size),
        "patch_size": tuple(vit.patch_embed.patch_size),
        "in_chans": vit.patch_embed.proj.in_channels,
        "num_classes": vit.num_classes,
        "embed_dim": vit.embed_dim,
        "blocks": blocks,
        "class_token": vit.cls_token is not None,
        "distilled": distilled,
        "reg_tokens": 0 if vit.reg_token is None else vit.reg_token.shape[1],
        "no_embed_class": vit.no_embed_class,
        "dynamic_img_size": vit.dynamic_img_size,
        "dynamic_img_pad": vit.patch_embed.dynamic_img_pad,
        "patch_bias": vit.patch_embed.proj.bias is not None,
        "embed_norm": norms.has(vit.patch_embed.norm, "patch_embed.norm"),
        "pre_norm": norms.has(vit.norm_pre, "norm_pre"),
        "final_norm": norms.has(vit.norm, "norm"),
        "fc_norm": norms.has(vit.fc_norm, "fc_norm"),
        "global_pool": vit.global_pool,
        "pool_include_prefix": vit.pool_include_prefix,
        "attn_pool": None if pool is None else _attn_pool_of(pool, norms),
        **_same_in_all_blocks(vit),
    }
    if norms.eps is not None:
        fields["norm_eps"] = norms.eps
    if pool is not None and "act" in fields and act_of(pool.mlp.act, "attn_pool.mlp.act") != fields["act"]:
        raise UnsupportedModel(f"attn_pool.mlp.act is {pool.mlp.act}: expected {fields['act']} as the blocks have")
    try:
        spec = ViTSpec(**fields)
        # whatever else was changed in the model shows in its tensors: another head, an adapter, pruned weights
        check_shapes(spec, shapes_of(model), "state_dict")
    except (SpecError, CheckpointError) as error:
        raise UnsupportedModel(f"{type(model).__name__}: {error}") from None
    if vit.num_prefix_tokens != spec.num_prefix_tokens:
        what = f"expected {spec.num_prefix_tokens}, as many as the model has"
        raise UnsupportedModel(f"num_prefix_tokens is {vit.num_prefix_tokens}: {what}")
    return spec


class _Norms:
    """Sees every norm of a model: LayerNorms with weight and bias, of one eps."""

    def __init__(self) -> None:
        self.eps: float | None = None
        self.first = ""

    def has(self, module: nn.Module, where: str) -> bool:
        if isinstance(module, nn.Identity):
            return False
        assert isinstance(module, nn.LayerNorm), "the parts are looked at first"
        if module.weight is None or module.bias is None:
            raise UnsupportedModel(f"{where}: expected a LayerNorm with weight and bias")
        if self.eps is None:
            self.eps, self.first = module.eps, where
        if module.eps != self.eps:
            raise UnsupportedModel(f"{where}.eps is {module.eps}: expected {self.eps} as {self.first} has")
        return True


def _block_of(block: nn.Module, where: str, norms: _Norms) -> BlockSpec:
    b: Any = block
    _refuse(first_refusal([Part(where, block, (TimmBlock,))]))
    attn: Any = b.attn
    _refuse(first_refusal([Part(f"{where}.attn", attn, (Attention,)), Part(f"{where}.mlp", b.mlp, MLP)]))
    if getattr(attn, "gate", None) is not None:
        raise UnsupportedModel(f"{where}.attn.gate is {type(attn.gate).__name__}: expected none")
    if attn.head_dim > MAX_HEAD_DIM:
        what = f"expected at most {MAX_HEAD_DIM}, the widest head that kernels take"
        raise UnsupportedModel(f"{where}.attn.head_dim is {attn.head_dim}: {what}")
    halves = (*half_parts(b, "1", f"{where}."), *half_parts(b, "2", f"{where}."))
    _refuse(first_refusal([*attention_parts(attn, f"{where}.attn."), *mlp_parts(b.mlp, f"{where}.mlp."), *halves]))
    for name in ("norm1", "norm2"):
        norms.has(getattr(b, name), f"{where}.{name}")
    return BlockSpec(
        qk_dims=(attn.head_dim,) * attn.num_heads,
        v_dims=(attn.head_dim,) * attn.num_heads,
        attn_scale=scale_of(attn),
        mlp_dim=b.mlp.fc1.out_features,
    )


def scale_of(attn: Any) -> float:
    """What a timm attention multiplies its scores by: on its fused path PyTorch's own choice, else ``attn.scale``."""
    return float(attn.head_dim**-0.5 if attn.fused_attn else attn.scale)


def _same_in_all_blocks(vit: Any) -> dict[str, Any]:
    """The switches that a spec has once. Raises where blocks differ."""
    fields: dict[str, Any] = {}
    for i, b in enumerate(vit.blocks):
        here = {
            "act": act_of(b.mlp.act, f"blocks.{i}.mlp.act"),
            "qkv_bias": b.attn.qkv.bias is not None,
            "proj_bias": b.attn.proj.bias is not None,
            "mlp_bias": b.mlp.fc1.bias is not None,
            "layer_scale": isinstance(b.ls1, LayerScale),
        }
        for name, value in here.items():
            if fields.setdefault(name, value) != value:
                raise UnsupportedModel(
                    f"blocks.{i}: {name} is {value}, expected {fields[name]} as the blocks before have"
                )
        for name, has, wanted in (
            ("mlp.fc2", b.mlp.fc2.bias is not None, here["mlp_bias"]),
            ("ls2", isinstance(b.ls2, LayerScale), here["layer_scale"]),
        ):
            if has != wanted:
                raise UnsupportedModel(f"blocks.{i}.{name}: expected the same switch as its sublayer's counterpart")
    return fields


def _attn_pool_of(pool: nn.Module, norms: _Norms) -> AttnPoolSpec:
    p: Any = pool
    name = "attn_pool."
    _refuse(first_refusal([Part("attn_pool", pool, (AttentionPoolLatent,))]))
    parts = [
        *(Part(name + linear, getattr(p, linear), LINEAR) for linear in ("q", "kv", "proj")),
        *(Part(name + norm, getattr(p, norm), IDENTITY) for norm in ("q_norm", "k_norm")),
        Part(f"{name}proj_drop", p.proj_drop, DROPOUT),
        Part(f"{name}norm", p.norm, NORM),
        Part(f"{name}mlp", p.mlp, MLP),
    ]
    _refuse(first_refusal(parts) or first_refusal(mlp_parts(p.mlp, f"{name}mlp.")))
    if p.pool != "token":
        raise UnsupportedModel(f"attn_pool.pool is {p.pool!r}: expected 'token'")
    if scale_of(p) != p.head_dim**-0.5:
        raise UnsupportedModel(f"attn_pool.scale is {p.scale}: expected {p.head_dim**-0.5}")
    norms.has(p.norm, "attn_pool.norm")
    return AttnPoolSpec(num_heads=p.num_heads, mlp_dim=p.mlp.fc1.out_features)


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise UnsupportedModel(reason)
