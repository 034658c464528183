"""The ops as PyTorch's dispatcher knows them: ``torch.ops.prunevit.*``, for ``torch.compile`` and ``torch.export``.

``norm_linear``, ``ragged_attention``, ``linear_residual`` and ``fused_mlp`` are the ops of this package, with their
contracts (``ragged_attention`` takes rows packed with ``align``: 8 for the cuda backend, 1 for the others); the last
two update x and return nothing. ``block`` is a whole transformer block as one native call, ``attention_sublayer`` and
``mlp_sublayer`` are its halves, ``attention`` and ``mlp`` the same without norm and residual; these five take a
module's own tensors and do the folding.

Every op takes the live weights and looks their pack up when it runs, so that no graph holds a pack: see ``_packs``,
which says what ``trust_versions`` means. ``backend`` is ``auto`` or a backend's name. None of the ops has a gradient.
``plain[name]`` is an op without the dispatcher, for callers who know that nobody traces, records or differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._blocks import attention_sublayer, block, mlp_sublayer, packed_table, run_mlp
from ._dispatch import HOW, owned, packed, packs, plain, register, run, target_of
from ._workspace import View
from .fold import Sublayer, attention_ops, channels
from .fused_mlp import Activation
from .fused_mlp.reference import ACTIVATIONS
from .heads import HeadTable
from .linear_residual import LinearResidual
from .norm_linear import NormLinear
from .op import Op
from .ragged_attention import RaggedAttention
from .target import Target
from .units import round_up

__all__ = [
    "attention",
    "attention_sublayer",
    "block",
    "fused_mlp",
    "linear_residual",
    "mlp",
    "mlp_sublayer",
    "norm_linear",
    "packs",
    "plain",
    "ragged_attention",
    "target_of",
]

# -- the ops of this package ------------------------------------------------------------------------------------------


@register(f"(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? reads=None, {HOW}) -> Tensor")
def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    reads: Tensor | None = None,
    backend: str = "auto",
    trust_versions: bool = False,
) -> Tensor:
    """x [B, N, E] -> [B, N, D]: LayerNorm without affine, then a linear map of the channels ``reads``."""
    embed_dim, out_dim = x.shape[-1], weight.shape[0]

    def make(target: Target, w: Tensor, b: Tensor | None, r: Tensor | None) -> list[Op]:
        return [NormLinear(embed_dim, w.float(), b if b is None else b.float(), eps, channels(r))]

    pack = packed(("norm_linear", embed_dim, eps), x, (weight, bias, reads), backend, trust_versions, make)
    views = [("x", *x.shape), ("y", *x.shape[:2], out_dim)]
    return owned(run(pack, views, [(0, 1)], {0: x})[1])


@norm_linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[0]))


@register('(Tensor qkv, int[] qk_dims, int[] v_dims, int align=1, str backend="auto") -> Tensor')
def ragged_attention(
    qkv: Tensor, qk_dims: Sequence[int], v_dims: Sequence[int], align: int = 1, backend: str = "auto"
) -> Tensor:
    """qkv [B, N, width] -> [B, N, out_width] of ``HeadTable.packed(qk_dims, v_dims, align=align)``."""
    heads = HeadTable.packed(qk_dims, v_dims, align=align)
    kind = ("ragged_attention", heads)
    pack = packed(kind, qkv, (), backend, True, lambda target: [RaggedAttention(heads)])
    views = [("qkv", *qkv.shape), ("c", *qkv.shape[:2], heads.out_width)]
    return owned(run(pack, views, [(0, 1)], {0: qkv})[1])


@ragged_attention.register_fake
def _(qkv: Tensor, qk_dims: Sequence[int], v_dims: Sequence[int], align: int = 1, backend: str = "auto") -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], sum(round_up(dim, align) for dim in v_dims)))


@register(
    f"(Tensor(a!) x, Tensor c, Tensor weight, Tensor? bias, Tensor? gamma=None, Tensor? writes=None, {HOW}) -> ()",
    mutates=("x",),
)
def linear_residual(
    x: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None = None,
    writes: Tensor | None = None,
    backend: str = "auto",
    trust_versions: bool = False,
) -> None:
    """x [B, N, E] += γ (c [B, N, K] Wᵀ + b), on the channels ``writes``."""
    embed_dim = x.shape[-1]

    def make(target: Target, w: Tensor, b: Tensor | None, g: Tensor | None, to: Tensor | None) -> list[Op]:
        bias, gamma = (t if t is None else t.float() for t in (b, g))
        return [LinearResidual(embed_dim, w.float(), bias, gamma, channels(to))]

    weights = (weight, bias, gamma, writes)
    pack = packed(("linear_residual", embed_dim), x, weights, backend, trust_versions, make)
    x.copy_(run(pack, [("c", *c.shape), ("x", *x.shape)], [(0, 1)], {0: c, 1: x})[1])


@linear_residual.register_fake
def _(*_: object, **__: object) -> None:
    return None


@register(
    "(Tensor(a!) x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, str act, float eps, Tensor? gamma=None, "
    f"Tensor? reads=None, Tensor? writes=None, {HOW}) -> ()",
    mutates=("x",),
)
def fused_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Activation,
    eps: float,
    gamma: Tensor | None = None,
    reads: Tensor | None = None,
    writes: Tensor | None = None,
    backend: str = "auto",
    trust_versions: bool = False,
) -> None:
    """x [B, N, E] += γ (act(LN(x) W1ᵀ + b1) W2ᵀ + b2); the norm has no affine part."""
    # without a norm's own weight and bias, the op is a sublayer that nothing is folded into
    weights = (None, None, w1, b1, w2, b2, gamma, reads, writes)
    x.copy_(run_mlp(x, weights, act, eps, backend, trust_versions))


@fused_mlp.register_fake
def _(*_: object, **__: object) -> None:
    return None


# -- attention and MLP alone -------------------------------------------------------------------------------------------


@register(
    "(Tensor x, Tensor qkv_weight, Tensor? qkv_bias, Tensor proj_weight, Tensor? proj_bias, int[] qk_dims, "
    f"int[] v_dims, float scale, {HOW}) -> Tensor"
)
def attention(
    x: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    qk_dims: Sequence[int],
    v_dims: Sequence[int],
    scale: float,
    backend: str = "auto",
    trust_versions: bool = False,
) -> Tensor:
    """proj(attention(qkv(x))): x [B, N, in] -> [B, N, out]."""
    out_dim, heads_key = proj_weight.shape[0], (tuple(qk_dims), tuple(v_dims))
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)

    def make(target: Target, *tensors: Tensor | None) -> list[Op]:
        table, half = packed_table(*heads_key, target.alignment), Sublayer(None, None, *tensors)  # type: ignore[arg-type]
        return list(attention_ops(target, out_dim, table, scale, None, half))

    pack = packed(("attention", *heads_key, scale), x, weights, backend, trust_versions, make)
    rows, heads = (x.shape[0], x.shape[1]), packed_table(*heads_key, pack.target.alignment)
    widths = {"a": x.shape[2], "qkv": heads.width, "c": heads.out_width, "y": out_dim}
    views: list[View] = [(name, *rows, width) for name, width in widths.items()]
    # the kernels add to what is there: a linear map alone is one added to zeros
    return owned(run(pack, views, [(0, 1), (1, 2), (2, 3)], {0: x, 1: None, 3: None})[3])


@attention.register_fake
def _(x: Tensor, qkv_weight: Tensor, qkv_bias: Tensor | None, proj_weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:2], proj_weight.shape[0]))


@register(
    f"(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str act, {HOW}) -> Tensor"
)
def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: Activation,
    backend: str = "auto",
    trust_versions: bool = False,
) -> Tensor:
    """fc2(act(fc1(x))): x [B, N, in] -> [B, N, out]."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x.new_zeros((*x.shape[:2], weight.shape[0]))
        linear_residual(y, x, weight, bias, backend=backend, trust_versions=trust_versions)
        return y

    hidden = ACTIVATIONS[act](linear(x, fc1_weight, fc1_bias))
    return linear(hidden, fc2_weight, fc2_bias)


@mlp.register_fake
def _(x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, *_: object, **__: object) -> Tensor:
    return x.new_empty((*x.shape[:2], fc2_weight.shape[0]))
