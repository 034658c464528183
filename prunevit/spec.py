"""ViTSpec: the ragged shape of a Vision Transformer, and the single source of it.

A spec names every width that pruning can change, and the switches of timm's ``VisionTransformer`` that decide what is
computed. Neither ``heads × width = embed_dim`` nor ``Dqk = Dv`` is assumed anywhere. A spec that comes from a file is
untrusted: every number is bounded here, before anything is allocated. ``docs/format.md`` is this file in prose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ._costs import BlockCost, block_costs, stem_and_head_macs, stem_and_head_params
from ._frozen import Document, Frozen
from .errors import SpecError

if TYPE_CHECKING:
    from torch import nn

FORMAT_VERSION: Literal[1] = 1
MAX_PARAMS = 2**33  # 32 GiB of fp32: an order above the largest ViT published with weights
MAX_HEAD_DIM = 128  # what kernels take: a model that could never run is refused where it is read, not at its first call

Act = Literal["gelu", "gelu_tanh", "quick_gelu", "relu"]
Rule = Literal["max_attention", "class_attention"]
GlobalPool = Literal["", "avg", "avgmax", "max", "token", "map"]
HeadDim = Annotated[int, Field(ge=1, le=MAX_HEAD_DIM)]
Channel = Annotated[int, Field(ge=0, lt=2**16)]
# a hostile file has one error a list, not one a number
Channels = Annotated[tuple[Channel, ...], Field(min_length=1, max_length=2**16, fail_fast=True)]
Size = tuple[Annotated[int, Field(ge=1, le=2**14)], Annotated[int, Field(ge=1, le=2**14)]]


class TokenSelect(Frozen):
    """Token reduction inside one block, to a static count.

    All prefix tokens stay; of the others the ``keep`` with the highest scores stay, in their order, ties going to the
    earlier. Scores are the attention that a token receives, summed over heads: from the class token
    (``class_attention``) or the most that any query pays it (``max_attention``); ``cascade`` accumulates them from the
    first block on, else they are those of the latest attention. ``fuse`` appends the score-weighted mean of the dropped
    tokens as one more token.
    """

    before: Literal["attn", "mlp"]
    rule: Rule
    keep: Annotated[int, Field(ge=1, le=2**20)]
    cascade: bool = False
    fuse: bool = False


class BlockSpec(Frozen):
    """One block: x + attn(norm1(x)), then x + mlp(norm2(x)).

    ``qk_dims`` and ``v_dims`` have one entry a surviving head. An *emptied* attention (no head) or MLP
    (``mlp_dim`` 0) still adds its output bias; a *removed* one (``has_attn`` or ``has_mlp`` false) adds nothing.
    ``attn_scale`` is the dense head's softmax scale, whatever the widths have become. ``attn_reads`` and ``mlp_reads``
    are the residual channels that qkv and fc1 read, ``attn_writes`` and ``mlp_writes`` those that proj and fc2 write;
    None means all. Norm statistics are always over all channels.
    """

    qk_dims: Annotated[tuple[HeadDim, ...], Field(max_length=256, fail_fast=True)]
    v_dims: Annotated[tuple[HeadDim, ...], Field(max_length=256, fail_fast=True)]
    attn_scale: Annotated[float, Field(gt=0, le=1e4)]
    mlp_dim: Annotated[int, Field(ge=0, le=2**18)]
    has_attn: bool = True
    has_mlp: bool = True
    select: TokenSelect | None = None
    attn_reads: Channels | None = None
    attn_writes: Channels | None = None
    mlp_reads: Channels | None = None
    mlp_writes: Channels | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.qk_dims) != len(self.v_dims):
            raise ValueError(
                f"v_dims: expected one width for each of {len(self.qk_dims)} heads, got {len(self.v_dims)}"
            )
        if self.qk_dims and not self.has_attn:
            raise ValueError(f"has_attn: a removed attention has no heads, got {len(self.qk_dims)}")
        if self.mlp_dim and not self.has_mlp:
            raise ValueError(f"has_mlp: a removed MLP has no neurons, got mlp_dim {self.mlp_dim}")
        for name in ("attn_reads", "attn_writes", "mlp_reads", "mlp_writes"):
            channels = getattr(self, name)
            if channels is not None and any(a >= b for a, b in pairwise(channels)):
                raise ValueError(f"{name}: expected ascending distinct channels, got {channels[:8]}…")
        return self

    @property
    def num_heads(self) -> int:
        return len(self.qk_dims)

    @property
    def qkv_dim(self) -> int:
        """Rows of ``attn.qkv``: [Q | K | V], each with its heads in order."""
        return 2 * sum(self.qk_dims) + sum(self.v_dims)

    @property
    def v_dim(self) -> int:
        """Columns of ``attn.proj``."""
        return sum(self.v_dims)


class AttnPoolSpec(Frozen):
    """SigLIP's attention-pooling head, which runs as it is behind the trunk."""

    num_heads: Annotated[int, Field(ge=1, le=256)]
    mlp_dim: Annotated[int, Field(ge=1, le=2**18)]


class ViTSpec(Document):
    """A Vision Transformer of any ragged shape, with the fields of timm's constructor that a standard ViT uses."""

    kind = "spec"
    error = SpecError

    format_version: Literal[1] = FORMAT_VERSION
    img_size: Size = (224, 224)
    patch_size: Size = (16, 16)
    in_chans: Annotated[int, Field(ge=1, le=4096)] = 3
    num_classes: Annotated[int, Field(ge=0, le=2**20)] = 1000
    embed_dim: Annotated[int, Field(ge=1, le=2**16)]
    blocks: Annotated[tuple[BlockSpec, ...], Field(max_length=1024, fail_fast=True)]

    class_token: bool = True
    distilled: bool = False  # a distillation token after the class token, and a head of its own
    reg_tokens: Annotated[int, Field(ge=0, le=4096)] = 0
    pos_embed: Literal["learn"] = "learn"
    no_embed_class: bool = False
    dynamic_img_size: bool = False
    dynamic_img_pad: bool = False

    act: Act = "gelu"
    norm_eps: Annotated[float, Field(gt=0, le=1)] = 1e-6
    patch_bias: bool = True
    qkv_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    embed_norm: bool = False
    pre_norm: bool = False
    layer_scale: bool = False
    final_norm: bool = True
    fc_norm: bool = False
    global_pool: GlobalPool = "token"
    pool_include_prefix: bool = False
    attn_pool: AttnPoolSpec | None = None

    @field_validator("format_version", mode="before")
    @classmethod
    def _known_version(cls, value: Any) -> Any:
        if isinstance(value, int) and value > FORMAT_VERSION:
            raise ValueError(
                f"written by a later prunevit (format {value}); this one reads up to {FORMAT_VERSION}: upgrade prunevit"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for axis, image, patch in zip(("height", "width"), self.img_size, self.patch_size):
            if patch > image:
                raise ValueError(f"patch_size: expected a patch within the image's {axis} {image}, got {patch}")
            if self.dynamic_img_size and not self.dynamic_img_pad and image % patch:
                what = f"expected a {axis} of whole patches of {patch} where sizes are dynamic and not padded"
                raise ValueError(f"img_size: {what}, got {image}")
        if self.global_pool == "token" and not self.class_token:
            raise ValueError("global_pool: token pooling needs a class token, got class_token false")
        if self.distilled and not (self.class_token and self.global_pool == "token" and self.reg_tokens == 0):
            raise ValueError(
                "distilled: expected a class token, token pooling and no registers, as timm's distilled DeiT has"
            )
        if self.distilled and self.fc_norm:
            raise ValueError("fc_norm: expected none in a distilled model, whose heads read their tokens directly")
        if (self.global_pool == "map") != (self.attn_pool is not None):
            got = f"{'none' if self.attn_pool is None else 'one'} with {self.global_pool!r}"
            raise ValueError(f"attn_pool: expected one with global_pool 'map' and none otherwise, got {got}")
        if self.attn_pool is not None and self.embed_dim % self.attn_pool.num_heads:
            raise ValueError(
                f"attn_pool.num_heads: expected a divisor of embed_dim {self.embed_dim}, got {self.attn_pool.num_heads}"
            )
        for i, block in enumerate(self.blocks):
            for name in ("attn_reads", "attn_writes", "mlp_reads", "mlp_writes"):
                channels = getattr(block, name)
                if channels is not None and channels[-1] >= self.embed_dim:
                    raise ValueError(
                        f"blocks.{i}.{name}: expected channels below embed_dim {self.embed_dim}, got {channels[-1]}"
                    )
        self._check_selection()
        if self.params() > MAX_PARAMS:
            raise ValueError(f"expected at most {MAX_PARAMS:,} parameters in all, got {self.params():,}")
        return self

    def _check_selection(self) -> None:
        tokens, scored, kinds = self.num_patches, False, set[tuple[str, bool]]()
        for i, block in enumerate(self.blocks):
            scored = scored or bool(block.qk_dims and block.select and block.select.before == "mlp")
            if (select := block.select) is not None:
                where = f"blocks.{i}.select"
                if not scored:
                    raise ValueError(
                        f"{where}: expected an attention with heads before it to take scores from, got none"
                    )
                if select.keep > tokens:
                    raise ValueError(
                        f"{where}.keep: expected at most the {tokens} patch tokens that reach it, got {select.keep}"
                    )
                if select.rule == "class_attention" and not self.class_token:
                    raise ValueError(f"{where}.rule: class_attention needs a class token, got class_token false")
                if self.dynamic_img_size:
                    raise ValueError(
                        f"{where}: a static token count needs a static image size, got dynamic_img_size true"
                    )
                tokens = select.keep + int(select.fuse)
                kinds.add((select.rule, select.cascade))
            scored = scored or bool(block.qk_dims)
        if len(kinds) > 1:
            raise ValueError(f"blocks.select: expected one rule and one cascade for all blocks, got {sorted(kinds)}")

    # -- shape -------------------------------------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.grid_of(self.img_size)

    def grid_of(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Patches down and across an image; dynamic padding rounds up, everything else down."""
        (height, width), (p, q) = img_size, self.patch_size
        pad = (p - 1, q - 1) if self.dynamic_img_pad else (0, 0)
        return (height + pad[0]) // p, (width + pad[1]) // q

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_prefix_positions(self) -> int:
        """How many of the prefix tokens have a position embedding: all of them or none."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def num_unpooled_tokens(self) -> int:
        """How many tokens, from the first on, averages, maxima and attention pooling leave out."""
        return 0 if self.pool_include_prefix else self.num_prefix_tokens

    @property
    def num_final_tokens(self) -> int:
        """How many tokens leave the last block."""
        return self.tokens()[-1][2] if self.blocks else self.num_prefix_tokens + self.num_patches

    @property
    def selection(self) -> tuple[Rule, bool] | None:
        """The rule that all token selections share, and whether it cascades; None where no token is dropped."""
        return next(((b.select.rule, b.select.cascade) for b in self.blocks if b.select is not None), None)

    def tokens(self) -> list[tuple[int, int, int]]:
        """For each block, how many tokens enter it, reach its attention, and reach its MLP."""
        counts, n = [], self.num_prefix_tokens + self.num_patches
        for block in self.blocks:
            entering = attn = mlp = n
            if block.select is not None:
                n = self.num_prefix_tokens + block.select.keep + int(block.select.fuse)
                mlp = n
                attn = n if block.select.before == "attn" else attn
            counts.append((entering, attn, mlp))
        return counts

    # -- cost --------------------------------------------------------------------------------------------------------

    def per_block(self) -> list[BlockCost]:
        """Parameters, and multiply-accumulates an image, of each block; QKᵀ and AV included."""
        return block_costs(self)

    def macs(self, batch: int = 1) -> int:
        """Multiply-accumulates of a forward pass over ``batch`` images; norms, softmax and activations not counted."""
        return batch * (stem_and_head_macs(self) + sum(block.macs for block in self.per_block()))

    def params(self) -> int:
        """Trainable parameters."""
        return stem_and_head_params(self) + sum(block.params for block in self.per_block())

    # -- in and out --------------------------------------------------------------------------------------------------

    def replace(self, **fields: Any) -> ViTSpec:
        """The same spec with some fields changed, and checked anew."""
        return ViTSpec(**{**{name: getattr(self, name) for name in type(self).model_fields}, **fields})

    @classmethod
    def from_shape(cls, entry: Mapping[str, Any], **fields: Any) -> ViTSpec:
        """A DeiT of a published shape: embed_dim, head_dim_dense, and per block heads, qk, v and mlp.

        ``qk`` and ``v`` are one width a block or a list a head. 224 px, patch 16, 1000 classes unless ``fields`` say
        otherwise.
        """

        def widths(value: int | Sequence[int], heads: int) -> tuple[int, ...]:
            return (value,) * heads if isinstance(value, int) else tuple(value)

        scale = entry["head_dim_dense"] ** -0.5
        columns = zip(entry["heads"], entry["qk"], entry["v"], entry["mlp"], strict=True)
        blocks = tuple(
            BlockSpec(qk_dims=widths(qk, heads), v_dims=widths(v, heads), attn_scale=scale, mlp_dim=mlp)
            for heads, qk, v, mlp in columns
        )
        return cls(embed_dim=entry["embed_dim"], blocks=blocks, **fields)

    @classmethod
    def from_timm(cls, model: nn.Module) -> ViTSpec:
        """The spec of a timm ``VisionTransformer``. Raises :class:`UnsupportedModel` naming the attribute."""
        from .models.from_timm import spec_of  # the one arrow that points up: a name people look for here

        return spec_of(model)
