"""What timm's callers ask of a Vision Transformer beside ``forward``: sizes, groups, heads, intermediate features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.layers import AttentionPoolLatent, LayerNorm, PatchEmbed, resample_abs_pos_embed, to_2tuple
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..errors import SpecError
from ..spec import ViTSpec
from .block import ACTIVATIONS


def linear_head(spec: ViTSpec, like: Tensor | None = None) -> nn.Module:
    """A fresh classifier, or nothing where a spec has no classes."""
    head = nn.Linear(spec.embed_dim, spec.num_classes) if spec.num_classes else nn.Identity()
    return head if like is None else head.to(like.device, like.dtype)


def norm_of(spec: ViTSpec, wanted: bool) -> nn.Module:
    """A fresh norm over all channels, or nothing where it is not wanted."""
    return LayerNorm(spec.embed_dim, eps=spec.norm_eps) if wanted else nn.Identity()


def attention_pool(spec: ViTSpec) -> nn.Module:
    """The fresh pooling module of a spec that has one."""
    assert spec.attn_pool is not None
    pool: nn.Module = AttentionPoolLatent(
        spec.embed_dim,
        num_heads=spec.attn_pool.num_heads,
        mlp_ratio=(spec.attn_pool.mlp_dim + 0.5) / spec.embed_dim,  # timm truncates the product back to mlp_dim
        norm_layer=partial(LayerNorm, eps=spec.norm_eps),
        act_layer=ACTIVATIONS[spec.act],
    )
    return pool


class TimmSurface(nn.Module):
    """The methods of timm's ``VisionTransformer`` that change or describe the module. ``spec`` follows each change."""

    spec: ViTSpec
    patch_embed: PatchEmbed
    pos_embed: nn.Parameter
    blocks: nn.Sequential
    norm: nn.Module
    attn_pool: nn.Module | None
    fc_norm: nn.Module
    head: nn.Module
    head_dist: nn.Module
    grad_checkpointing: bool
    distilled_training: bool

    @property
    def embed_dim(self) -> int:
        return self.spec.embed_dim

    @property
    def num_features(self) -> int:
        return self.spec.embed_dim

    @property
    def head_hidden_size(self) -> int:
        return self.spec.embed_dim

    @property
    def num_classes(self) -> int:
        return self.spec.num_classes

    @property
    def in_chans(self) -> int:
        return self.spec.in_chans

    @property
    def global_pool(self) -> str:
        return self.spec.global_pool

    @property
    def num_prefix_tokens(self) -> int:
        return self.spec.num_prefix_tokens

    @property
    def no_embed_class(self) -> bool:
        return self.spec.no_embed_class

    @property
    def has_class_token(self) -> bool:
        return self.spec.class_token

    @property
    def selects(self) -> bool:
        """Whether some block selects tokens."""
        return any(block.select is not None for block in self.spec.blocks)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        reduction = max(self.spec.patch_size)
        return [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction} for i in range(self.spec.depth)
        ]

    # What timm's own export (save_for_hf, push_to_hf_hub) writes of a model. timm sets both to what it built the model
    # with; the spec knows what has become of it.

    @property
    def _model_args(self) -> dict[str, Any]:
        return {"spec": self.spec.to_dict()}

    @_model_args.setter
    def _model_args(self, value: object) -> None: ...

    @property
    def _traits(self) -> dict[str, Any]:
        size, fixed = self.spec.img_size, not self.spec.dynamic_img_size
        return {"img_size": size, "fixed_input_size": fixed, "first_conv": "patch_embed.proj"}

    @_traits.setter
    def _traits(self, value: object) -> None: ...

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {
            "stem": r"^cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, give both heads' logits as a pair instead of their mean."""
        self.distilled_training = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        return (self.head, self.head_dist) if self.spec.distilled else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier, and another pooling if given; norms stay where they are."""
        fields: dict[str, Any] = {"num_classes": num_classes}
        if global_pool is not None and not self.spec.distilled:
            fields["global_pool"] = global_pool
            if global_pool != "map":
                fields["attn_pool"] = None
        elif global_pool not in (None, "", "token"):
            raise SpecError(f"global_pool: expected token pooling of a distilled model, got {global_pool!r}")
        self.spec = self.spec.replace(**fields)
        if self.spec.attn_pool is None:
            self.attn_pool = None
        self.head = linear_head(self.spec, like=self.pos_embed).train(self.training)
        if self.spec.distilled:
            self.head_dist = linear_head(self.spec, like=self.pos_embed).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another image or patch size: position embeddings and the patch kernel are resampled."""
        given = {"img_size": img_size, "patch_size": patch_size}
        spec = self.spec.replace(**{name: tuple(to_2tuple(size)) for name, size in given.items() if size is not None})
        if spec.grid_size != self.spec.grid_size:
            positions = resample_abs_pos_embed(
                self.pos_embed,
                new_size=list(spec.grid_size),
                old_size=list(self.spec.grid_size),
                num_prefix_tokens=spec.num_prefix_positions,
            )
            self.pos_embed = nn.Parameter(positions.detach(), requires_grad=self.pos_embed.requires_grad)
        self.patch_embed.set_input_size(img_size=spec.img_size, patch_size=spec.patch_size)
        self.spec = spec

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of ``indices``, and if asked the final norm and the head."""
        take, last = feature_take_indices(self.spec.depth, indices)
        self.spec = self.spec.replace(
            blocks=self.spec.blocks[: last + 1],
            final_norm=self.spec.final_norm and not prune_norm,
            fc_norm=self.spec.fc_norm and not prune_head,
        )
        self.blocks = self.blocks[: last + 1]
        self.norm = nn.Identity() if prune_norm else self.norm
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, "")
        return list(take)
