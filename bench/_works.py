"""What is timed: ops on the blocks of published shapes and their least cost; on a GPU also models, and the goals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunevit import ViTSpec, shapes
from prunevit.spec import BlockSpec
from prunevit_kernels import FusedMlp, HeadTable, NormLinear, Op, RaggedAttention, Target
from prunevit_kernels.units import round_up

TOKENS = 197
OVERLAPPING = "prunevit:overlapping"  # launches: PRUNEVIT_PDL=1, which GPUs of sm_90 and newer have
Work = dict[str, Any]  # name, batch; of a block also e, qk, v, f
Cost = tuple[float, float, float]  # FLOP, bytes, exponentials
HURT_BY_PADDING = ("snp_deit_tiny", "snp_deit_small", "snp_deit_small_1g3", "ragged_deit_small")


def up8(width: int) -> int:
    return round_up(width, 8)


def padded_spec(spec: ViTSpec, *, grouped: bool) -> ViTSpec:
    """Every width rounded up to 8, as peers want them: all heads of a layer to one width, or each head to its own."""

    def block(b: BlockSpec) -> BlockSpec:
        widths = [up8(max(qk, v)) for qk, v in zip(b.qk_dims, b.v_dims)]
        heads = tuple(widths if grouped else [max(widths)] * len(widths)) if widths else ()
        return b.model_copy(update={"qk_dims": heads, "v_dims": heads, "mlp_dim": up8(b.mlp_dim)})

    return spec.model_copy(update={"embed_dim": up8(spec.embed_dim), "blocks": tuple(map(block, spec.blocks))})


def blocks_of(op: str, names: list[str], batches: list[int]) -> list[Work]:
    """The blocks of some shapes at each batch size, no two alike to this op."""
    found = dict[object, Work]()
    for name in names:
        spec = shapes.get(name)
        for i, block in enumerate(spec.blocks):
            qk, v, f = list(block.qk_dims), list(block.v_dims), block.mlp_dim
            alike = {"fused_mlp": f, "norm_linear": sum(qk) * 2 + sum(v)}.get(op, str((qk, v)))
            if f if op == "fused_mlp" else qk:
                for batch in batches:
                    facts = {"name": name, "block": i, "batch": batch, "e": spec.embed_dim, "qk": qk, "v": v, "f": f}
                    found.setdefault((spec.embed_dim, alike, batch), facts)
    return list(found.values())


def cost(op: str, work: Work, itemsize: int = 2) -> Cost:
    """Useful work alone: what is computed, moved once, and raised to a power."""
    rows, e, f = work["batch"] * TOKENS, work["e"], work["f"]
    qk, v = sum(work["qk"]), sum(work["v"])
    if op == "ragged_attention":
        exps = rows * TOKENS * len(work["qk"])
        return 2 * rows * TOKENS * (qk + v), itemsize * rows * (2 * qk + 2 * v), exps
    if op == "norm_linear":
        d = 2 * qk + v
        return 2 * rows * e * d, itemsize * (rows * (e + d) + e * d), 0
    return 4 * rows * e * f, itemsize * (2 * rows * e + 2 * e * f), 0


def floor_ms(costs: list[Cost], peaks: dict[str, float]) -> float:
    """The least time: step by step, the slowest of the three resources."""
    rates = peaks["flops"], peaks["bandwidth"], peaks["exps"]
    return 1e3 * sum(max(amount / rate for amount, rate in zip(cost_, rates)) for cost_ in costs)


def make(op: str, work: Work, target: Target) -> tuple[Op, list[Tensor]]:
    """The op with random weights, and its buffers."""
    b, e, f = work["batch"], work["e"], work["f"]
    heads = HeadTable.packed(work["qk"], work["v"], align=target.alignment)

    def buffer(width: int) -> Tensor:
        rows = torch.randn(b, TOKENS, target.pitch(width), device=target.device)
        return rows.to(target.dtype)[..., :width]

    if op == "ragged_attention":
        return RaggedAttention(heads), [buffer(heads.width), buffer(heads.out_width)]
    if op == "norm_linear":
        weight = torch.randn(heads.width, e) / e**0.5
        return NormLinear(e, weight, torch.randn(heads.width), 1e-6), [buffer(e), buffer(heads.width)]
    w1, w2 = torch.randn(f, e) / e**0.5, torch.randn(e, f) / f**0.5 * 1e-3  # x is updated over and over
    return FusedMlp(e, w1, torch.randn(f), w2, torch.zeros(e), "gelu", 1e-6), [buffer(e)]


def goals(kind: str, work: Work) -> tuple[float | None, float | None, tuple[str, ...]]:
    """DESIGN's, on an H100: how many times the best peer, which share of the floor (at batch 256 alone), and the peers
    that the first is about: it says nothing where one of them is missing."""
    batch = work["batch"]
    large = batch == 256
    if kind == "ragged_attention":
        hurt = work["name"] in HURT_BY_PADDING
        return 2.0 if hurt else 1.0, 0.6 if hurt and large else None, ("sdpa padded",)
    if kind == "fused_mlp":
        narrow = work["f"] <= 1.6 * work["e"]
        return 1.3 if narrow else 1.0, 0.7 if narrow and large else None, ("eager", "inductor max-autotune")
    if kind == "model" and batch == 1:
        return 2.0, None, ("compile reduce-overhead",)
    if kind == "model" and batch in (64, 256):
        return 1.5, 0.55, ("compile max-autotune",)
    return None, None, ()
