"""torch.ops.prunevit: schemas, fakes, mutation and what each op computes, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from prunevit_kernels import ContractError, HeadTable, Target
from prunevit_kernels.fused_mlp import fused_mlp
from prunevit_kernels.library import packs
from prunevit_kernels.linear_residual import linear_residual
from prunevit_kernels.norm_linear import norm_linear
from prunevit_kernels.ragged_attention import ragged_attention
from prunevit_kernels.target import cpu_extension_built

ops = torch.ops.prunevit
BACKENDS = ["torch", *(["cpu"] if cpu_extension_built() else [])]
E, HIDDEN, QK, V = 29, 31, [13, 5, 1], [12, 3, 7]
READS, WRITES = [0, 3, 4, 28], [27, 1, 2]


def rand(*shape: int, seed: int = 0) -> Tensor:
    spread = 0.5 if len(shape) < 2 else shape[-1] ** -0.5
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * spread + 0.1


def tokens(width: int = E, batch: int = 2, count: int = 5) -> Tensor:
    return rand(batch, count, width) * width**0.5 + 3


def calls(partial: bool = False) -> dict[str, tuple[Any, ...]]:
    """Every op with arguments; ``partial``: few channels, layer-scale, no bias where one may lack."""
    reads, writes = (torch.tensor(READS), torch.tensor(WRITES)) if partial else (None, None)
    narrow, out = (len(READS), len(WRITES)) if partial else (E, E)
    gamma = rand(out, seed=3) if partial else None
    bias = None if partial else rand(out)
    heads = HeadTable.packed(QK, V)
    norm = (rand(E) + 1, rand(E, seed=1))
    qkv = (rand(heads.width, narrow), None if partial else rand(heads.width))
    proj = (rand(out, heads.out_width), bias)
    fc1, fc2 = (rand(HIDDEN, narrow), rand(HIDDEN)), (rand(out, HIDDEN), bias)
    alone = (rand(heads.width, E), rand(heads.width), rand(9, heads.out_width), None)
    ends = (gamma, reads, writes)
    halves = ([*norm, *qkv, *proj, *ends], [*norm, *fc1, *fc2, *ends])
    return {
        "norm_linear": (tokens(), rand(17, narrow), rand(17), 1e-6, reads),
        "ragged_attention": (tokens(heads.width), QK, V),
        "linear_residual": (tokens(), tokens(13), rand(out, 13), bias, gamma, writes),
        "fused_mlp": (tokens(), *fc1, *fc2, "gelu_tanh", 1e-6, gamma, reads, writes),
        "attention_sublayer": (tokens(), *norm, *qkv, *proj, gamma, reads, writes, QK, V, 0.25, 1e-6),
        "attention_sublayer_scored": (
            *(tokens(), *norm, *qkv, *proj, gamma, reads, writes, QK, V, 0.25, 1e-6),
            "max_attention",
        ),
        "mlp_sublayer": (tokens(), *norm, *fc1, *fc2, gamma, reads, writes, "relu", 1e-5),
        "block": (tokens(), *halves, QK, V, 0.25, "relu", [1e-6, 1e-5]),
        "block_scored": (tokens(), *halves, QK, V, 0.25, "relu", [1e-6, 1e-5], "max_attention"),
        "attention": (tokens(), *alone, QK, V, 0.25),
        "mlp": (tokens(), rand(HIDDEN, E), None, rand(9, HIDDEN), rand(9), "quick_gelu"),
    }


NAMES = list(calls())


def reference(name: str, args: tuple[Any, ...]) -> Any:
    """The same in plain PyTorch, unfolded, in the dtype of the arguments."""

    def attend(x: Tensor, qkv: tuple[Any, ...], proj: tuple[Any, ...], scale: float) -> Tensor:
        heads = HeadTable.packed(QK, V)
        packed = F.linear(x, *qkv)
        factor = torch.ones(heads.width, dtype=x.dtype)
        factor[: sum(QK)] = scale * 1.4426950408889634
        return F.linear(ragged_attention(packed * factor, heads), *proj)

    def written(x: Tensor, y: Tensor, gamma: Tensor | None, writes: Tensor | None) -> Tensor:
        y = y if gamma is None else gamma * y
        return x + y if writes is None else x.index_add(-1, writes, y)

    if name == "norm_linear":
        x, w, b, eps, reads = args
        return norm_linear(x, w, b, eps, None if reads is None else reads.tolist())
    if name == "ragged_attention":
        return ragged_attention(args[0], HeadTable.packed(QK, V))
    if name == "linear_residual":
        x, c, w, b, gamma, writes = args
        return linear_residual(x, c, w, b, gamma, None if writes is None else writes.tolist())
    if name == "fused_mlp":
        *rest, reads, writes = args
        lists = (None if r is None else r.tolist() for r in (reads, writes))
        return fused_mlp(*rest, *lists)
    if name.startswith("attention_sublayer"):
        x, g, b, qw, qb, pw, pb, gamma, reads, writes, _, _, scale, eps = args[:14]
        read = F.layer_norm(x, (E,), g, b, eps)
        read = read if reads is None else read[..., reads]
        return written(x, attend(read, (qw, qb), (pw, pb), scale), gamma, writes)
    if name == "mlp_sublayer":
        x, g, b, w1, b1, w2, b2, gamma, reads, writes, _, eps = args
        read = F.layer_norm(x, (E,), g, b, eps)
        read = read if reads is None else read[..., reads]
        return written(x, F.linear(F.relu(F.linear(read, w1, b1)), w2, b2), gamma, writes)
    if name.startswith("block"):
        x, first, second, _, _, scale, act, (eps1, eps2) = args[:8]
        x = reference("attention_sublayer", (x, *first, QK, V, scale, eps1))
        return reference("mlp_sublayer", (x, *second, act, eps2))
    if name == "attention":
        return attend(args[0], args[1:3], args[3:5], args[7])
    x, w1, b1, w2, b2, _ = args
    hidden = F.linear(x, w1, b1)
    return F.linear(hidden * torch.sigmoid(1.702 * hidden), w2, b2)


def call(name: str, args: tuple[Any, ...], **how: Any) -> Tensor:
    """Run an op; what it returns or has updated."""
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    out = getattr(ops, name.removesuffix("_scored"))(*args, **how)
    if out is None:
        return args[0]
    return out[0] if isinstance(out, tuple) else out


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    def one(a: Any) -> Any:
        if isinstance(a, list):
            return [one(item) for item in a]
        return a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a

    return tuple(one(a) for a in args)


def check(name: str, args: tuple[Any, ...], dtype: torch.dtype, **how: Any) -> None:
    args = cast(args, dtype)
    truth = reference(name, cast(args, torch.float64))
    got, eager = call(name, args, **how), reference(name, args)
    assert got.shape == eager.shape
    assert got.dtype == dtype
    allowed = 2 * (eager.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
    assert (got.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("partial", [False, True], ids=["all_channels", "few_channels"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_op_computes_its_reference(name: str, backend: str, partial: bool) -> None:
    check(name, calls(partial)[name], torch.float32, backend=backend)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ragged_attention"])
def test_half_precision_on_the_reference_ops(name: str) -> None:
    check(name, calls()[name], torch.bfloat16, backend="torch")


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    args = calls(partial=True)[name]
    opcheck(getattr(ops, name.removesuffix("_scored")), args)


def test_scores() -> None:
    """The most attention that any query pays each key, summed over heads."""
    x, *rest = calls()["attention_sublayer"]
    norm_weight, norm_bias, weight, bias = rest[:4]
    qkv = F.linear(F.layer_norm(x, (E,), norm_weight, norm_bias, 1e-6), weight, bias)
    q, k, _ = qkv.split([sum(QK), sum(QK), sum(V)], dim=-1)
    heads = zip(q.split(QK, dim=-1), k.split(QK, dim=-1))
    want = sum((0.25 * q @ k.mT).softmax(-1).amax(1) for q, k in heads)
    for backend in BACKENDS:
        _, scores = ops.attention_sublayer(x, *rest, "max_attention", backend=backend)
        torch.testing.assert_close(scores, want)
        assert ops.attention_sublayer(x, *rest, backend=backend)[1].shape == (0,)
        torch.testing.assert_close(ops.block(*calls()["block_scored"], backend=backend)[1], want)


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs_and_what_lies_around_them(name: str) -> None:
    args = calls()[name]
    x = args[0]
    wide = torch.full((*x.shape[:2], x.shape[2] + 3), torch.nan)
    view = wide[..., 1:-2]
    view.copy_(x)
    got = getattr(ops, name.removesuffix("_scored"))(view, *args[1:])
    got = view if got is None else got[0] if isinstance(got, tuple) else got
    torch.testing.assert_close(got, call(name, args))
    assert wide[..., :1].isnan().all()
    assert wide[..., -2:].isnan().all()


def test_a_gradient_is_refused_not_lost() -> None:
    args = calls()["mlp_sublayer"]
    out = ops.mlp_sublayer(args[0].requires_grad_(), *args[1:])
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def test_bad_arguments_are_named() -> None:
    x, *rest = calls()["mlp_sublayer"]
    with pytest.raises(ContractError, match="a backend"):
        ops.mlp_sublayer(x, *rest, backend="fpga")
    with pytest.raises(ContractError, match="an activation"):
        ops.mlp_sublayer(x, *rest[:-2], "swish", 1e-6)
    y, first, second, *others = calls()["block"]
    with pytest.raises(ContractError, match="9 tensors or None for each half"):
        ops.block(y, first[:-1], second, *others)
    with pytest.raises(ContractError, match="the cpu backend in fp32"):
        ops.mlp_sublayer(x.double(), *rest, backend="cpu")


def test_two_ops_of_the_same_weights_have_two_packs() -> None:
    """A pack is made of everything that an op depends on: another eps, activation, scale or head is another pack."""
    x, *rest = calls()["mlp_sublayer"]
    made = packs.made
    first = ops.mlp_sublayer(x, *rest[:-2], "relu", 1e-6)
    other_eps = ops.mlp_sublayer(x, *rest[:-2], "relu", 10.0)
    other_act = ops.mlp_sublayer(x, *rest[:-2], "gelu", 1e-6)
    assert packs.made == made + 3
    assert not torch.equal(first, other_eps)
    assert not torch.equal(first, other_act)
    assert torch.equal(first, ops.mlp_sublayer(x, *rest[:-2], "relu", 1e-6))
    assert packs.made == made + 3


def test_launches_overlap_where_they_are_asked_to_and_can(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = [torch.device("cuda", 0), torch.bfloat16]
    assert not Target("cuda", *gpu).overlaps
    monkeypatch.setenv("PRUNEVIT_PDL", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert Target("cuda", *gpu).overlaps
    assert not Target("torch").overlaps
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with pytest.raises(ContractError, match=r"sm_90 or newer for PRUNEVIT_PDL=1, got \(8, 9\)"):
        _ = Target("cuda", *gpu).overlaps
    monkeypatch.setenv("PRUNEVIT_PDL", "yes")
    with pytest.raises(ContractError, match="0 or 1 in PRUNEVIT_PDL, got yes"):
        _ = Target("cuda", *gpu).overlaps


def test_an_unaligned_table_is_only_for_backends_without_alignment() -> None:
    assert Target("torch").alignment == 1
    table = HeadTable.packed(QK, V, align=8)
    qkv = tokens(table.width)
    torch.testing.assert_close(ops.ragged_attention(qkv, QK, V, 8), ragged_attention(qkv, table))
    with pytest.raises(ContractError, match="qkv of shape"):
        ops.ragged_attention(qkv, QK, V)
