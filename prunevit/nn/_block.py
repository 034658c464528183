"""A whole transformer block on kernels: norm → qkv → heads → proj → residual → norm → MLP → residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunevit_kernels.library import plain

from ..models.block import Block as EagerBlock
from ..models.block import act_of
from ..models.parts import MLP, Part, half_parts
from ..spec import Act, BlockSpec
from ._attention import (
    ATTENTIONS,
    attention_refusal,
    heads_of,
    init_linears,
    one_block_spec,
    scale_or_default,
    widths_refusal,
)
from ._mlp import mlp_refusal
from ._module import KernelModule, given, input_refusal, parts_refusal, tensors_refusal, watched
from ._ready import ready, tensors


class BlockOnKernels(KernelModule):
    """A pre-norm transformer block x [B, N, E] -> [B, N, E] on kernels."""

    @property
    def _attends(self) -> bool:
        """Has it heads? What an emptied attention adds is a bias, and runs eagerly; the same for an emptied MLP."""
        attn: Any = self.attn
        return attn is not None and attn.qkv is not None

    @property
    def _has_mlp(self) -> bool:
        mlp: Any = self.mlp
        return mlp is not None and not isinstance(mlp, nn.Sequential)

    def refusal(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        reason = input_refusal(x, 3, 3) or self._call_refusal(x, attn_mask, is_causal) or self._own_refusal()
        if reason is None and self._attends:
            reason = self._width_refusal("1", x) or widths_refusal(self.attn, "attn.")
            reason = reason or tensors_refusal(x, self._attention_tensors())
        if reason is None and self._has_mlp:
            reason = self._width_refusal("2", x) or tensors_refusal(x, self._mlp_tensors())
        return reason

    def _look(self) -> str | None:
        reason = super()._look()
        if reason is None and self._attends:
            reason = self._half_refusal("1") or self._kind_refusal("attn", ATTENTIONS)
            reason = reason or attention_refusal(self.attn, "attn.")
        if reason is None and self._has_mlp:
            reason = self._half_refusal("2") or self._kind_refusal("mlp", MLP)
            reason = reason or mlp_refusal(self.mlp, "mlp.")
        return reason

    def _kind_refusal(self, name: str, types: tuple[type[nn.Module], ...]) -> str | None:
        return parts_refusal([Part(name, getattr(self, name), types)])

    def _half_refusal(self, half: str) -> str | None:
        return parts_refusal(half_parts(self, half))

    def _width_refusal(self, half: str, x: Tensor) -> str | None:
        shape = getattr(self, "norm" + half).normalized_shape
        if shape != (x.shape[-1],):
            return f"norm{half} is over {shape}, and x is {x.shape[-1]} wide"
        return self._gamma_refusal(half)

    def _gamma_refusal(self, half: str) -> str | None:
        """PyTorch would broadcast a γ of another shape."""
        block: Any = self
        scale, last = (block.ls1, block.attn.proj) if half == "1" else (block.ls2, block.mlp.fc2)
        if isinstance(scale, nn.Identity) or scale.gamma.shape == last.weight.shape[:1]:
            return None
        return f"ls{half}.gamma has the shape {tuple(scale.gamma.shape)}, and its sublayer writes {len(last.weight)}"

    def _sublayer_tensors(self, half: str, first: Any, last: Any) -> tuple[Tensor | None, ...]:
        norm, scale = getattr(self, "norm" + half), getattr(self, "ls" + half)
        return (
            norm.weight,
            norm.bias,
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            None if isinstance(scale, nn.Identity) else scale.gamma,
        )

    def _attention_tensors(self) -> tuple[Tensor | None, ...]:
        attn: Any = self.attn
        return self._sublayer_tensors("1", attn.qkv, attn.proj)

    def _mlp_tensors(self) -> tuple[Tensor | None, ...]:
        mlp: Any = self.mlp
        return self._sublayer_tensors("2", mlp.fc1, mlp.fc2)

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        block: Any = self
        channels = block.attn_reads, block.attn_writes
        heads, eps = heads_of(block.attn), block.norm1.eps
        x, scores = torch.ops.prunevit.attention_sublayer(
            x, *self._attention_tensors(), *channels, *heads, eps, block.rule or "", *self._how
        )
        return x, scores if block.rule else None

    def _feed(self, x: Tensor) -> Tensor:
        block: Any = self
        channels = block.mlp_reads, block.mlp_writes
        act, eps = act_of(block.mlp.act), block.norm2.eps
        out: Tensor = torch.ops.prunevit.mlp_sublayer(x, *self._mlp_tensors(), *channels, act, eps, *self._how)
        return out

    def _quickly(self, x: Tensor) -> Tensor | None:
        """The block of a call that asks for nothing else, or None where somebody has to look more closely."""
        if watched(x) is not None or x.dim() != 3 or self._call_refusal(x, None, False) is not None:
            return None
        snapshot, known = ready(self)
        if known is None or x.shape[-1] != known.embed_dim:
            return None
        weights = snapshot.parameters()
        if set(map(type, weights)) != {nn.Parameter} or [w.shape for w in weights] != known.sizes:
            return None
        if tensors_refusal(x, weights) is not None:
            return None
        halves = tensors(weights, known.attention), tensors(weights, known.mlp)
        out: Tensor = plain["block"](x, *halves, *known.heads, known.act, known.eps, "", *self._how)[0]
        return out

    def _whole(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Both halves as one call."""
        block: Any = self
        run = torch.ops.prunevit.block if watched(x) else plain["block"]
        x, scores = run(
            x,
            [*self._attention_tensors(), block.attn_reads, block.attn_writes],
            [*self._mlp_tensors(), block.mlp_reads, block.mlp_writes],
            *heads_of(block.attn),
            act_of(block.mlp.act),
            [block.norm1.eps, block.norm2.eps],
            block.rule or "",
            *self._how,
        )
        return x, scores if block.rule else None


class TimmBlockOnKernels(BlockOnKernels):
    """timm's transformer block x [B, N, E] -> [B, N, E] on kernels."""

    attn_reads = attn_writes = mlp_reads = mlp_writes = None  # all channels
    rule = None  # no scores

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        out = self._quickly(x) if attn_mask is None and not is_causal else None
        if out is not None:
            return out
        reason = self.refusal(x, attn_mask, is_causal)
        if reason is None:
            return self._whole(x)[0]
        self._tell(reason)
        return super().forward(x, **given(attn_mask, is_causal))  # type: ignore[no-any-return]


class EagerBlockOnKernels(BlockOnKernels):
    """prunevit's ragged block x [B, N, E] -> [B, N', E] on kernels; token selection runs between them."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, scores: Tensor | None = None
    ) -> Any:
        out = self._quickly(x) if attn_mask is None and not is_causal else None
        if out is not None:
            return out
        reason = self.refusal(x, attn_mask, is_causal)
        if reason is None:
            return self._run(x, scores)
        self._tell(reason)
        return super().forward(x, attn_mask, is_causal, scores)

    def _run(self, x: Tensor, scores: Tensor | None) -> Any:
        block: Any = self
        if self._attends and self._has_mlp and not (block.select is not None and block.select.before == "mlp"):
            return block._through(x, scores, self._whole, lambda x: x)
        attend = self._attend if self._attends else block._attention_half
        return block._through(x, scores, attend, self._feed if self._has_mlp else block._mlp_half)


class RaggedBlock(EagerBlockOnKernels, EagerBlock):
    """x + γ attn(norm(x)), then x + γ mlp(norm(x)): x [B, N, E] -> [B, N, E], heads and MLP of any widths.

    ``qk_dims`` and ``v_dims`` have one entry from 1 to 128 a head, ``mlp_dim`` is the MLP's hidden width.
    ``attn_scale`` multiplies the scores before the softmax (``qk_dims[0] ** -0.5`` if it is not given; a pruned block
    keeps its dense one). ``init_values``: layer-scale γ to start from; None for no layer-scale. Parameter names are
    timm's. Masks, dropout in training and anything with a gradient run on the reference path.
    """

    def __init__(
        self,
        embed_dim: int,
        qk_dims: Sequence[int],
        v_dims: Sequence[int],
        mlp_dim: int,
        *,
        attn_scale: float | None = None,
        act: Act = "gelu",
        norm_eps: float = 1e-6,
        init_values: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        mlp_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        scale = scale_or_default(attn_scale, qk_dims)
        spec = one_block_spec(
            embed_dim,
            BlockSpec(qk_dims=tuple(qk_dims), v_dims=tuple(v_dims), attn_scale=scale, mlp_dim=mlp_dim),
            act=act,
            norm_eps=norm_eps,
            layer_scale=init_values is not None,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            mlp_bias=mlp_bias,
        )
        gamma = 1e-5 if init_values is None else init_values
        super().__init__(spec, 0, init_values=gamma, proj_drop=proj_drop, attn_drop=attn_drop, drop_path=drop_path)
        init_linears(self)
