"""Attention alone: qkv, ragged heads and proj on kernels; norm and residual stay with whoever calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention as TimmAttention
from torch import Tensor, nn

from prunevit_kernels import MAX_HEAD_DIM

from ..models.block import RaggedAttention as EagerAttention
from ..models.block import init_linear
from ..models.from_timm import scale_of
from ..models.parts import attention_parts
from ..spec import BlockSpec, ViTSpec
from ._module import KernelModule, given, input_refusal, parts_refusal, tensors_refusal


class Heads(NamedTuple):
    """An attention's widths, and its score scale."""

    qk_dims: list[int]
    v_dims: list[int]
    scale: float


def heads_of(attn: Any) -> Heads:
    """Of timm's attention or prunevit's."""
    if isinstance(attn, EagerAttention):
        return Heads(attn.qk_dims, attn.v_dims, attn.scale)
    dims = [attn.head_dim] * attn.num_heads
    return Heads(dims, dims, scale_of(attn))


def attention_refusal(attn: Any, name: str) -> str | None:
    """Why kernels cannot compute what this attention computes, its tensors aside."""
    if getattr(attn, "gate", None) is not None:
        return f"{name}gate is a {type(attn.gate).__name__}"
    if isinstance(attn, EagerAttention) and attn.training and attn.attn_drop:
        return f"{name}attn_drop drops at a rate of {attn.attn_drop:.3g} in training"
    reason = parts_refusal(attention_parts(attn, name))
    if reason is not None:
        return reason
    qk_dims, v_dims, _ = heads_of(attn)
    too_wide = max(*qk_dims, *v_dims) > MAX_HEAD_DIM
    return f"{name[:-1] or 'attention'} has a head wider than {MAX_HEAD_DIM}" if too_wide else None


def widths_refusal(attn: Any, name: str) -> str | None:
    """Weights may change their shape without anything else that changes."""
    qk_dims, v_dims, _ = heads_of(attn)
    fits = attn.qkv.weight.shape[0] == 2 * sum(qk_dims) + sum(v_dims) and attn.proj.weight.shape[1] == sum(v_dims)
    return None if fits else f"{name}qkv and {name}proj do not have the widths of the heads"


class AttentionOnKernels(KernelModule):
    """Self-attention x [B, N, in] -> [B, N, out] on kernels."""

    def refusal(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        self_: Any = self
        if self_.qkv is None:
            return "it has no heads"
        reason = input_refusal(x, 3, 3) or self._call_refusal(x, attn_mask, is_causal) or self._own_refusal()
        return reason or widths_refusal(self, "") or tensors_refusal(x, self._tensors())

    def _look(self) -> str | None:
        return super()._look() or attention_refusal(self, "")

    def _tensors(self) -> tuple[Tensor | None, ...]:
        self_: Any = self
        return self_.qkv.weight, self_.qkv.bias, self_.proj.weight, self_.proj.bias

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if args or kwargs:
            self._tell("token scores are asked for")
            return super().forward(x, attn_mask, is_causal, *args, **kwargs)
        reason = self.refusal(x, attn_mask, is_causal)
        if reason is None:
            return torch.ops.prunevit.attention(x, *self._tensors(), *heads_of(self), *self._how)
        self._tell(reason)
        return super().forward(x, **given(attn_mask, is_causal))


class RaggedAttention(AttentionOnKernels, EagerAttention):
    """Self-attention whose heads have a query-key and a value width each: x [B, N, in] -> [B, N, out].

    ``qk_dims`` and ``v_dims`` have one entry from 1 to 128 a head. ``scale`` multiplies the scores before the softmax
    (``qk_dims[0] ** -0.5`` if it is not given; a pruned attention keeps its dense one). ``attn_mask`` and
    ``is_causal`` are accepted, and run on the reference path, as do dropout in training and anything with a gradient.
    """

    def __init__(
        self,
        in_features: int,
        qk_dims: Sequence[int],
        v_dims: Sequence[int],
        out_features: int | None = None,
        *,
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        scale = scale_or_default(scale, qk_dims)
        block = BlockSpec(qk_dims=tuple(qk_dims), v_dims=tuple(v_dims), attn_scale=scale, mlp_dim=0, has_mlp=False)
        spec = one_block_spec(in_features, block, qkv_bias=qkv_bias, proj_bias=proj_bias)
        super().__init__(spec, block, in_features, out_features or in_features, attn_drop, proj_drop)
        init_linears(self)


def scale_or_default(scale: float | None, qk_dims: Sequence[int]) -> float:
    """That of the first head where none is given; without heads it multiplies nothing."""
    if scale is not None:
        return scale
    return qk_dims[0] ** -0.5 if len(qk_dims) else 1.0


def one_block_spec(embed_dim: int, block: BlockSpec, **switches: Any) -> ViTSpec:
    """A spec that holds one block; its image and its classes are nobody's."""
    return ViTSpec(
        img_size=(16, 16), patch_size=(16, 16), num_classes=0, embed_dim=embed_dim, blocks=(block,), **switches
    )


def init_linears(module: nn.Module) -> None:
    for child in module.modules():
        init_linear(child)


ATTENTIONS = (TimmAttention, EagerAttention)
