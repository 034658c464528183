"""PrunedViT: the trainable module of a spec, in eager PyTorch, with the surface of timm's ``VisionTransformer``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, LayerNorm, PatchDropout, PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from timm.models.vision_transformer import global_pool_nlc
from torch import Tensor, nn

from ..errors import InputError, SpecError
from ..spec import ViTSpec
from .block import Block, init_linear
from .select import scored_blocks
from .surface import TimmSurface, attention_pool, linear_head, norm_of


class PrunedViT(TimmSurface):
    """images [B, C, H, W] -> logits [B, num_classes], or features where a spec has no classes.

    Parameter names are timm's. ``spec`` always describes the module as it is, also after ``reset_classifier``,
    ``set_input_size`` and ``prune_intermediate_layers``. ``plan`` (what pruning kept), ``provenance`` (base model,
    each pruning as it was asked for, measured accuracy) and ``pretrained_cfg`` (timm's data configuration and label
    names) travel with checkpoints.
    """

    def __init__(
        self,
        spec: ViTSpec,
        *,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        init_values: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.plan: dict[str, Any] | None = None
        self.provenance: dict[str, Any] = {}
        self.pretrained_cfg: dict[str, Any] = {}
        self.grad_checkpointing = self.distilled_training = False
        if patch_drop_rate and self.selects:
            raise SpecError(f"patch_drop_rate: expected 0 in a spec that selects tokens, got {patch_drop_rate}")
        with nullcontext() if device is None else torch.device(device):
            self._build_stem(pos_drop_rate, patch_drop_rate)
            scored = scored_blocks(spec)
            self.blocks = nn.Sequential(
                *(
                    Block(
                        spec,
                        i,
                        scored=scored[i],
                        init_values=init_values,
                        proj_drop=proj_drop_rate,
                        attn_drop=attn_drop_rate,
                        drop_path=drop_path_rate * i / max(1, spec.depth - 1),
                    )
                    for i in range(spec.depth)
                )
            )
            self._build_head(drop_rate)
        if str(device) != "meta":
            self.init_weights()
            self.to(device=device, dtype=dtype)

    def _build_stem(self, pos_drop_rate: float, patch_drop_rate: float) -> None:
        spec = self.spec
        dynamic: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC"} if spec.dynamic_img_size else {}
        self.patch_embed = PatchEmbed(
            img_size=spec.img_size,
            patch_size=spec.patch_size,
            in_chans=spec.in_chans,
            embed_dim=spec.embed_dim,
            norm_layer=partial(LayerNorm, eps=spec.norm_eps) if spec.embed_norm else None,
            bias=spec.patch_bias,
            dynamic_img_pad=spec.dynamic_img_pad,
            **dynamic,
        )

        def token(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.zeros(1, count, spec.embed_dim)) if count else None

        self.cls_token, self.dist_token = token(int(spec.class_token)), token(int(spec.distilled))
        self.reg_token = token(spec.reg_tokens)
        positions = spec.num_patches + spec.num_prefix_positions
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, spec.embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.norm_pre = norm_of(spec, spec.pre_norm)

    def _build_head(self, drop_rate: float) -> None:
        spec = self.spec
        self.norm = norm_of(spec, spec.final_norm)
        self.attn_pool = None if spec.attn_pool is None else attention_pool(spec)
        self.fc_norm = norm_of(spec, spec.fc_norm)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = linear_head(spec)
        if spec.distilled:
            self.head_dist = linear_head(spec)

    def init_weights(self) -> None:
        """As timm initialises: truncated normal linears of 0.02, zero biases, almost-zero prefix tokens."""
        trunc_normal_(self.pos_embed, std=0.02)
        for token, std in ((self.cls_token, 1e-6), (self.reg_token, 1e-6), (self.dist_token, 0.02)):
            if token is not None:
                nn.init.normal_(token, std=std)
        for module in self.modules():
            init_linear(module)
            if isinstance(module, AttentionPoolLatent):
                module.init_weights()

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Any:
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """images [B, C, H, W] -> normalised tokens [B, N, E]."""
        x = self._embed(x)
        scores = None
        for block in self._masked_blocks(attn_mask, is_causal):
            x, scores = self._step(block, x, attn_mask, is_causal, scores)
        return self.norm(x)  # type: ignore[no-any-return]

    def _embed(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        pos_embed, spec = self.pos_embed, self.spec
        if spec.dynamic_img_size:
            pos_embed = resample_abs_pos_embed(
                pos_embed,
                new_size=list(x.shape[1:3]),
                old_size=list(spec.grid_size),
                num_prefix_tokens=spec.num_prefix_positions,
            )
            x = x.flatten(1, 2)
        prefix = [
            token.expand(x.shape[0], -1, -1)
            for token in (self.cls_token, self.dist_token, self.reg_token)
            if token is not None
        ]
        x = (
            torch.cat([*prefix, x + pos_embed], dim=1)
            if spec.no_embed_class
            else torch.cat([*prefix, x], 1) + pos_embed
        )
        return self.norm_pre(self.patch_drop(self.pos_drop(x)))  # type: ignore[no-any-return]

    def _masked_blocks(self, attn_mask: Tensor | None, is_causal: bool) -> nn.Sequential:
        if self.selects and (attn_mask is not None or is_causal):
            raise InputError("expected no attn_mask and no is_causal in a model that selects tokens, got one")
        return self.blocks

    def _step(
        self, block: nn.Module, x: Tensor, attn_mask: Tensor | None, is_causal: bool, scores: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        save_memory = self.grad_checkpointing and torch.is_grad_enabled()
        out = (
            checkpoint(block, x, attn_mask, is_causal, scores)
            if save_memory
            else block(x, attn_mask, is_causal, scores)
        )
        return out if self.selects else (out, None)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """tokens [B, N, E] -> [B, E]; with pooling ``""`` they stay [B, N, E]."""
        if self.attn_pool is not None:
            return self.attn_pool(x[:, self.spec.num_unpooled_tokens :])  # type: ignore[no-any-return]
        pooled: Tensor = global_pool_nlc(
            x,
            pool_type=self.global_pool if pool_type is None else pool_type,
            num_prefix_tokens=self.num_prefix_tokens,
            reduce_include_prefix=self.spec.pool_include_prefix,
        )
        return pooled

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """normalised tokens [B, N, E] -> logits; a pair of them in distilled training."""
        if not self.spec.distilled:
            x = self.head_drop(self.fc_norm(self.pool(x)))
            return x if pre_logits else self.head(x)
        x, x_dist = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (x + x_dist) / 2
        x, x_dist = self.head(x), self.head_dist(x_dist)
        return (x, x_dist) if self.distilled_training and self.training else (x + x_dist) / 2

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """The tokens after chosen blocks, as timm gives them: see timm's ``forward_intermediates``."""
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"expected output_fmt NCHW or NLC, got {output_fmt!r}")
        if output_fmt == "NCHW" and self.selects:
            raise InputError("expected output_fmt NLC of a model that selects tokens, got NCHW")
        take, last = feature_take_indices(self.spec.depth, indices)
        height, width = x.shape[-2:]
        x = self._embed(x)
        scores, taken = None, []
        blocks = self._masked_blocks(attn_mask, is_causal)
        for i, block in enumerate(blocks[: last + 1] if stop_early else blocks):
            x, scores = self._step(block, x, attn_mask, is_causal, scores)
            if i in take:
                taken.append(self.norm(x) if norm else x)
        n = self.num_prefix_tokens
        prefix, patches = [y[:, :n] for y in taken], [y[:, n:] for y in taken]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size((height, width))
            patches = [y.unflatten(1, grid).permute(0, 3, 1, 2).contiguous() for y in patches]
        with_prefix = return_prefix_tokens and n > 0
        if output_dict:
            result = {"image_intermediates": patches}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else result | {"image_features": self.norm(x)}
        intermediates = list(zip(patches, prefix)) if with_prefix else patches
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """DINO's name for the same."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
            attn_mask=attn_mask,
        )
