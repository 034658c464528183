"""A transformer block as PyTorch's dispatcher knows it, whole and in halves: see ``library``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, float32

from ._dispatch import HOW, owned, packed, register, run
from ._expect import expect
from ._packs import Pack, Weights
from ._workspace import View
from .fold import Sublayer, attention_ops, mlp_op
from .fused_mlp import Activation
from .heads import HeadTable
from .op import Op
from .target import Target
from .token_scores import Rule, TokenScores

__all__ = ["attention_sublayer", "block", "mlp_sublayer", "packed_table", "run_mlp"]

packed_table = cache(lambda qk_dims, v_dims, align: HeadTable.packed(qk_dims, v_dims, align=align))


@register(
    "(Tensor x, Tensor?[] attention, Tensor?[] mlp, int[] qk_dims, int[] v_dims, float scale, str act, "
    f'float[] eps, str rule="", {HOW}) -> (Tensor, Tensor)'
)
def block(
    x: Tensor,
    attention: Sequence[Tensor | None],
    mlp: Sequence[Tensor | None],
    qk_dims: Sequence[int],
    v_dims: Sequence[int],
    scale: float,
    act: Activation,
    eps: Sequence[float],
    rule: Rule | str = "",
    backend: str = "auto",
    trust_versions: bool = False,
) -> tuple[Tensor, Tensor]:
    """``mlp_sublayer`` of ``attention_sublayer``, and the scores. ``attention`` and ``mlp`` are each one's tensors:
    norm weight and bias, the first linear's, the last linear's, γ, reads, writes; ``eps`` is of both norms.
    """
    expect(len(attention) == len(mlp) == 9, "9 tensors or None for each half", got=(len(attention), len(mlp)))
    expect(len(eps) == 2, "the eps of both norms", got=tuple(eps))
    embed_dim, heads_key = x.shape[-1], (tuple(qk_dims), tuple(v_dims))

    def make(target: Target, *tensors: Tensor | None) -> list[Op]:
        attends = _attention_ops(target, embed_dim, heads_key, scale, eps[0], rule, tensors[:9])
        return [*attends, mlp_op(embed_dim, act, eps[1], Sublayer(*tensors[9:]))]  # type: ignore[arg-type]

    kind = ("block", embed_dim, *heads_key, scale, act, *eps, rule)
    pack = packed(kind, x, (*attention, *mlp), backend, trust_versions, make)
    return _run_attention(pack, x, heads_key, rule, [(0,)])


@block.register_fake
def _(x: Tensor, *args: Any, rule: str = "", **_: object) -> tuple[Tensor, Tensor]:
    return _block_shapes(x, args[7] if len(args) > 7 else rule)


def _block_shapes(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:2] if rule else (0,), dtype=float32)


_HeadsKey = tuple[tuple[int, ...], tuple[int, ...]]


def _attention_ops(
    target: Target,
    embed_dim: int,
    heads: _HeadsKey,
    scale: float,
    eps: float,
    rule: Rule | str,
    tensors: Sequence[Tensor | None],
) -> list[Op]:
    """norm and qkv, heads, scores where there is a rule, proj and residual."""
    table = packed_table(*heads, target.alignment)
    half = Sublayer(*tensors)  # type: ignore[arg-type]
    qkv, attention, out = attention_ops(target, embed_dim, table, scale, eps, half)
    scored: list[Op] = [TokenScores(attention.heads, rule)] if rule else []  # type: ignore[arg-type]
    return [qkv, attention, *scored, out]


def _run_attention(
    pack: Pack, x: Tensor, heads_key: _HeadsKey, rule: Rule | str, after: list[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """Run ``_attention_ops`` and what comes ``after`` them on buffer 0, x; x and the scores."""
    rows, heads = (x.shape[0], x.shape[1]), packed_table(*heads_key, pack.target.alignment)
    views: list[View] = [("x", *x.shape), ("qkv", *rows, heads.width), ("c", *rows, heads.out_width)]
    if not rule:
        windows = run(pack, views, [(0, 1), (1, 2), (2, 0), *after], {0: x})
        return owned(windows[0]), x.new_empty(0, dtype=float32)
    windows = run(pack, [*views, ("scores", *rows, 0)], [(0, 1), (1, 2), (1, 3), (2, 0), *after], {0: x})
    return owned(windows[0]), owned(windows[3])


_AFFINE = "Tensor? norm_weight, Tensor? norm_bias"
_CHANNELS = "Tensor? gamma, Tensor? reads, Tensor? writes"


@register(
    f"(Tensor x, {_AFFINE}, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, {_CHANNELS}, "
    f'int[] qk_dims, int[] v_dims, float scale, float eps, str rule="", {HOW}) -> (Tensor, Tensor)'
)
def attention_sublayer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    gamma: Tensor | None,
    reads: Tensor | None,
    writes: Tensor | None,
    qk_dims: Sequence[int],
    v_dims: Sequence[int],
    scale: float,
    eps: float,
    rule: Rule | str = "",
    backend: str = "auto",
    trust_versions: bool = False,
) -> tuple[Tensor, Tensor]:
    """x + γ proj(attention(qkv(norm(x)))) [B, N, E], and the tokens' scores [B, N] by ``rule`` ([0] without one)."""
    weights = (
        norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, gamma, reads, writes,
    )  # fmt: skip
    embed_dim, heads_key = x.shape[-1], (tuple(qk_dims), tuple(v_dims))

    def make(target: Target, *tensors: Tensor | None) -> list[Op]:
        return _attention_ops(target, embed_dim, heads_key, scale, eps, rule, tensors)

    kind = ("attention_sublayer", embed_dim, *heads_key, scale, eps, rule)
    pack = packed(kind, x, weights, backend, trust_versions, make)
    return _run_attention(pack, x, heads_key, rule, [])


@attention_sublayer.register_fake
def _(x: Tensor, *args: Any, rule: str = "", **_: object) -> tuple[Tensor, Tensor]:
    return _block_shapes(x, args[13] if len(args) > 13 else rule)


@register(
    f"(Tensor x, {_AFFINE}, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, {_CHANNELS}, "
    f"str act, float eps, {HOW}) -> Tensor"
)
def mlp_sublayer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    gamma: Tensor | None,
    reads: Tensor | None,
    writes: Tensor | None,
    act: Activation,
    eps: float,
    backend: str = "auto",
    trust_versions: bool = False,
) -> Tensor:
    """x + γ fc2(act(fc1(norm(x)))) [B, N, E]."""
    weights = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, gamma, reads, writes)
    return owned(run_mlp(x, weights, act, eps, backend, trust_versions))


@mlp_sublayer.register_fake
def _(x: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty(x.shape)


def run_mlp(x: Tensor, weights: Weights, act: Activation, eps: float, backend: str, trust: bool) -> Tensor:
    """x + γ fc2(act(fc1(norm(x)))) in a buffer of the workspace."""
    embed_dim = x.shape[-1]

    def make(target: Target, *tensors: Tensor | None) -> list[Op]:
        return [mlp_op(embed_dim, act, eps, Sublayer(*tensors))]  # type: ignore[arg-type]

    pack = packed(("mlp_sublayer", embed_dim, act, eps), x, weights, backend, trust, make)
    result: Tensor = run(pack, [("x", *x.shape)], [(0,)], {0: x})[0]
    return result
