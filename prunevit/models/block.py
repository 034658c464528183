"""One ragged transformer block: heads and MLP of any widths, on the residual channels that its spec says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import GELU, DropPath, GELUTanh, LayerNorm, LayerScale, Mlp, QuickGELU, trunc_normal_
from torch import Tensor, nn

from ..errors import UnsupportedModel
from ..spec import Act, BlockSpec, Channels, Rule, ViTSpec
from .select import attention_scores, select_tokens

ACTIVATIONS: dict[Act, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
}


def act_of(module: nn.Module, where: str = "the activation") -> Act:
    """The name of an activation module. Raises :class:`UnsupportedModel`."""
    if isinstance(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    names: dict[type[nn.Module], Act] = {GELU: "gelu", GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu", nn.ReLU: "relu"}
    for kind, name in names.items():
        if isinstance(module, kind):
            return name
    raise UnsupportedModel(f"{where} is {type(module).__name__}: expected GELU, GELUTanh, QuickGELU or ReLU")


def init_linear(module: nn.Module) -> None:
    """As timm initialises a ViT's: truncated normal weights of 0.02, zero biases. Any other module is left as it is."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class OutputBias(nn.Module):
    """What is left of the last linear of an emptied sublayer: its bias, or nothing."""

    def __init__(self, out_features: int, bias: bool) -> None:
        super().__init__()
        self.out_features = out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.out_features)
        return x.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class RaggedAttention(nn.Module):
    """Self-attention whose heads have a query-key and a value width each.

    ``qkv`` rows are [Q | K | V], heads in order. Heads of equal widths run as one batch.
    """

    def __init__(self, spec: ViTSpec, block: BlockSpec, in_dim: int, out_dim: int, attn_drop: float, proj_drop: float):
        super().__init__()
        self.qk_dims, self.v_dims, self.scale = list(block.qk_dims), list(block.v_dims), block.attn_scale
        self.num_heads = block.num_heads
        groups: dict[tuple[int, int], list[int]] = {}
        for head, dims in enumerate(zip(block.qk_dims, block.v_dims)):
            groups.setdefault(dims, []).append(head)
        self.groups = list(groups.values())
        self.qkv = nn.Linear(in_dim, block.qkv_dim, bias=spec.qkv_bias) if block.qk_dims else None
        self.attn_drop = attn_drop
        self.proj = (
            nn.Linear(block.v_dim, out_dim, bias=spec.proj_bias)
            if block.qk_dims
            else OutputBias(out_dim, spec.proj_bias)
        )
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rule: Rule | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, N, in] -> [B, N, out]; with a ``rule``, also the tokens' scores [B, N] by it."""
        if self.qkv is None:
            return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]
        q, k, v = torch.split(self.qkv(x), [sum(self.qk_dims), sum(self.qk_dims), sum(self.v_dims)], dim=-1)
        outs, scores = [], x.new_zeros(())
        for heads in self.groups:
            q_g, k_g, v_g = (
                _heads_of(y, dims, heads) for y, dims in ((q, self.qk_dims), (k, self.qk_dims), (v, self.v_dims))
            )
            per_head = attn_mask is not None and attn_mask.dim() > 2 and attn_mask.shape[-3] == self.num_heads > 1
            mask = attn_mask[..., heads, :, :] if attn_mask is not None and per_head else attn_mask
            outs.append(self._attend(q_g, k_g, v_g, mask, is_causal))
            if rule is not None:
                scores = scores + attention_scores(q_g, k_g, self.scale, rule)
        y = self.proj_drop(self.proj(_merge(outs, self.groups)))
        return y if rule is None else (y, scores)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dqk, dv = q.shape[-1], v.shape[-1]
        # PyTorch's fused kernels want one width; without it they fall back to twice the time. Zeros change nothing.
        q, k, v = (F.pad(y, (0, max(dqk, dv) - y.shape[-1])) if y.shape[-1] < max(dqk, dv) else y for y in (q, k, v))
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.attn_drop if self.training else 0.0,
            is_causal=is_causal,
            scale=self.scale,  # the dense head's: 1/√Dqk would be another model
        )[..., :dv]


def _heads_of(x: Tensor, dims: list[int], heads: list[int]) -> Tensor:
    """x [B, N, Σ dims] -> [B, H, N, D] of the given, equally wide heads. No copy where they are neighbours."""
    width = dims[heads[0]]
    if heads[-1] - heads[0] + 1 == len(heads):
        start = sum(dims[: heads[0]])
        return x[..., start : start + width * len(heads)].reshape(*x.shape[:-1], len(heads), width).transpose(1, 2)
    columns = torch.split(x, dims, dim=-1)
    return torch.stack([columns[h] for h in heads], dim=1)


def _merge(outs: list[Tensor], groups: list[list[int]]) -> Tensor:
    """[B, H, N, Dv] of each group -> [B, N, Σ Dv], heads in order."""
    if len(outs) == 1:
        return outs[0].transpose(1, 2).flatten(2)
    columns = {head: o_h for heads, o in zip(groups, outs) for head, o_h in zip(heads, o.unbind(1))}
    return torch.cat([columns[head] for head in sorted(columns)], dim=-1)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)), with a token selection before either."""

    attn_reads: Tensor | None
    attn_writes: Tensor | None
    mlp_reads: Tensor | None
    mlp_writes: Tensor | None

    def __init__(
        self,
        spec: ViTSpec,
        index: int,
        *,
        scored: bool = False,
        init_values: float = 1e-5,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        block = spec.blocks[index]
        self.select, self.prefix = block.select, spec.num_prefix_tokens
        self.selects = spec.selection is not None
        # only a fused token lets a gradient through to the scores
        self.fuses = any(b.select is not None and b.select.fuse for b in spec.blocks)
        rule, self.cascade = spec.selection or (None, False)
        self.rule = rule if scored else None
        for name in ("attn_reads", "attn_writes", "mlp_reads", "mlp_writes"):
            channels = getattr(block, name)
            # on the CPU whatever the device context: a module built without memory still has its indices
            buffer = None if channels is None else torch.tensor(channels, device="cpu")
            self.register_buffer(name, buffer, persistent=False)

        def size(channels: Channels | None) -> int:
            return spec.embed_dim if channels is None else len(channels)

        def norm(wanted: bool) -> nn.Module:
            return LayerNorm(spec.embed_dim, eps=spec.norm_eps) if wanted else nn.Identity()

        def scale(channels: Channels | None, wanted: bool) -> nn.Module:
            return LayerScale(size(channels), init_values) if wanted and spec.layer_scale else nn.Identity()

        def path() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = norm(bool(block.qk_dims))
        self.attn = (
            RaggedAttention(spec, block, size(block.attn_reads), size(block.attn_writes), attn_drop, proj_drop)
            if block.has_attn
            else None
        )
        self.ls1, self.drop_path1 = scale(block.attn_writes, block.has_attn), path()

        self.norm2 = norm(block.mlp_dim > 0)
        self.mlp = (
            _mlp(spec, block, size(block.mlp_reads), size(block.mlp_writes), proj_drop) if block.has_mlp else None
        )
        self.ls2, self.drop_path2 = scale(block.mlp_writes, block.has_mlp), path()

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, scores: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """x [B, N, E] -> [B, N', E]; in a model that selects tokens, with the scores [B, N'] for the blocks after."""
        return self._through(
            x, scores, partial(self._attention_half, attn_mask=attn_mask, is_causal=is_causal), self._mlp_half
        )

    def _through(
        self,
        x: Tensor,
        scores: Tensor | None,
        attend: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        feed: Callable[[Tensor], Tensor],
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """The two sublayers as they are given, each with its residual, and the selection before either."""
        if self.select is not None and self.select.before == "attn":
            x, scores = self._select(x, scores)
        if self.attn is not None:
            x, latest = attend(x)
            if latest is not None:
                scores = scores + latest if self.cascade and scores is not None else latest
        if self.select is not None and self.select.before == "mlp":
            x, scores = self._select(x, scores)
        if self.mlp is not None:
            x = feed(x)
        return (x, scores) if self.selects else x

    def _attention_half(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """x with the attention added, and the tokens' scores [B, N] where a selection reads them."""
        assert self.attn is not None
        y, scores = self.attn(read_channels(self.norm1(x), self.attn_reads), attn_mask, is_causal, self.rule), None
        if self.rule is not None:
            y, scores = y
            scores = scores if self.fuses else scores.detach()
        return write_channels(x, self.drop_path1(self.ls1(y)), self.attn_writes), scores

    def _mlp_half(self, x: Tensor) -> Tensor:
        """x with the MLP added."""
        assert self.mlp is not None
        y = self.mlp(read_channels(self.norm2(x), self.mlp_reads))
        return write_channels(x, self.drop_path2(self.ls2(y)), self.mlp_writes)

    def _select(self, x: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.select is not None
        assert scores is not None, "a spec has an attention before each selection"
        return select_tokens(x, scores, self.select.keep, self.prefix, self.select.fuse)


def _mlp(spec: ViTSpec, block: BlockSpec, in_dim: int, out_dim: int, drop: float) -> nn.Module:
    if block.mlp_dim:
        return Mlp(  # type: ignore[no-any-return]
            in_dim,
            block.mlp_dim,
            out_dim,
            act_layer=cast("type[nn.GELU]", ACTIVATIONS[spec.act]),
            bias=spec.mlp_bias,
            drop=drop,
        )
    empty = nn.Sequential()
    empty.add_module("fc2", OutputBias(out_dim, spec.mlp_bias))
    return empty


def read_channels(x: Tensor, channels: Tensor | None) -> Tensor:
    """The channels of x that a linear reads; None means all."""
    return x if channels is None else x.index_select(-1, channels)


def write_channels(x: Tensor, y: Tensor, channels: Tensor | None) -> Tensor:
    """x with y added to the channels that a linear writes."""
    return x + y if channels is None else x.index_add(-1, channels, y.to(x.dtype))
