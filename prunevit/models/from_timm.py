"""A timm ``VisionTransformer`` as a spec and as a PrunedViT. Scope is decided by module types and attributes."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from timm.layers import AttentionPoolLatent, LayerScale, Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block as TimmBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import CheckpointError, UnsupportedModel
from ..spec import AttnPoolSpec, BlockSpec, ViTSpec
from .block import act_of
from .tensors import check_shapes
from .vit import PrunedViT


def from_timm(model: nn.Module) -> PrunedViT:
    """A timm ``VisionTransformer`` as a PrunedViT with a copy of its weights; the two agree to rounding.

    Dropout rates, training mode and ``requires_grad`` are not carried over: they belong to a training run. Raises
    :class:`UnsupportedModel` naming the attribute that no spec describes.
    """
    spec, state = spec_of(model), model.state_dict()
    pruned = PrunedViT(spec, device="meta")  # no memory and no initialisation: every tensor is the model's, copied
    pruned.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    pruned.to(state["patch_embed.proj.weight"].device)
    cfg = getattr(model, "pretrained_cfg", None) or {}
    pruned.pretrained_cfg = {key: value for key, value in cfg.items() if key != "state_dict"}
    name = cfg.get("architecture")
    if name is not None:
        tag = cfg.get("tag")
        pruned.provenance = {"base_model": f"{name}.{tag}" if tag else name}
    return pruned.train(model.training)


def as_pruned(model: nn.Module) -> PrunedViT:
    """A PrunedViT as it is, or a timm model converted. Raises :class:`UnsupportedModel`."""
    return model if isinstance(model, PrunedViT) else from_timm(model)


def spec_of(model: nn.Module) -> ViTSpec:
    """The spec of a timm ``VisionTransformer``. Raises :class:`UnsupportedModel` naming the attribute."""
    if _kind_of(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise UnsupportedModel(
            f"{type(model).__name__}: expected timm's VisionTransformer or VisionTransformerDistilled"
        )
    vit: Any = model
    distilled = isinstance(model, VisionTransformerDistilled)
    _require(vit.patch_embed, "patch_embed", PatchEmbed)
    _require(vit.patch_embed.proj, "patch_embed.proj", nn.Conv2d)
    if vit.patch_embed.img_size is None:
        raise UnsupportedModel("patch_embed.img_size is None: expected an image size that position embeddings fit")
    if vit.pos_embed is None:
        raise UnsupportedModel("pos_embed is None: expected a learned position embedding")
    norms, pool = _Norms(), vit.attn_pool
    blocks = tuple(_block_of(block, f"blocks.{i}", norms) for i, block in enumerate(vit.blocks))
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
        check_shapes(spec, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, "state_dict")
    except (ValidationError, CheckpointError) as error:
        raise UnsupportedModel(f"{type(model).__name__}: {error}") from None
    return spec


class _Norms:
    """Sees every norm of a model: LayerNorms with weight and bias, of one eps."""

    def __init__(self) -> None:
        self.eps: float | None = None
        self.first = ""

    def has(self, module: nn.Module, where: str) -> bool:
        if isinstance(module, nn.Identity):
            return False
        if not isinstance(module, nn.LayerNorm):
            raise UnsupportedModel(f"{where} is {type(module).__name__}: expected LayerNorm or none")
        if module.weight is None or module.bias is None:
            raise UnsupportedModel(f"{where}: expected a LayerNorm with weight and bias")
        if self.eps is None:
            self.eps, self.first = module.eps, where
        if module.eps != self.eps:
            raise UnsupportedModel(f"{where}.eps is {module.eps}: expected {self.eps} as {self.first} has")
        return True


def _block_of(block: nn.Module, where: str, norms: _Norms) -> BlockSpec:
    _require(block, where, TimmBlock)
    b: Any = block
    attn: Any = b.attn
    _require(attn, f"{where}.attn", Attention)
    _require(b.mlp, f"{where}.mlp", Mlp)
    for name, module in ((f"{where}.attn.{n}", getattr(attn, n, None)) for n in ("q_norm", "k_norm", "norm", "gate")):
        _absent(module, name)
    _absent(getattr(b.mlp, "norm", None), f"{where}.mlp.norm")
    for linear in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        _require(block.get_submodule(linear), f"{where}.{linear}", nn.Linear)
    for name in ("norm1", "norm2"):
        if not norms.has(getattr(b, name), f"{where}.{name}"):
            raise UnsupportedModel(f"{where}.{name} is Identity: expected LayerNorm")
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
    _require(pool, "attn_pool", AttentionPoolLatent)
    p: Any = pool
    _absent(p.q_norm, "attn_pool.q_norm")
    norms.has(p.norm, "attn_pool.norm")
    return AttnPoolSpec(num_heads=p.num_heads, mlp_dim=p.mlp.fc1.out_features)


def _require(module: nn.Module, where: str, kind: type[nn.Module]) -> None:
    if _kind_of(module) is not kind:
        raise UnsupportedModel(f"{where} is {type(module).__name__}: expected {kind.__name__}")


def _kind_of(module: nn.Module) -> type[nn.Module]:
    """Its type, or what it was before ``prunevit.accelerate`` gave it another that computes the same."""
    kind: type[nn.Module] = getattr(type(module), "runs_without", type(module))
    return kind


def _absent(module: nn.Module | None, where: str) -> None:
    if module is not None and not isinstance(module, nn.Identity):
        raise UnsupportedModel(f"{where} is {type(module).__name__}: expected none")
