"""A Vision Transformer written down a second time: one image, one head, one token at a time, in fp64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from prunevit.spec import ViTSpec

State = Mapping[str, Tensor]


def slow_vit(spec: ViTSpec, state: State, images: Tensor) -> Tensor:
    """images [B, C, H, W] -> logits (or features), from a state dict alone."""
    weights = {name: tensor.double() for name, tensor in state.items()}
    return torch.stack([_image(spec, weights, image.double()) for image in images])


def _image(spec: ViTSpec, w: State, image: Tensor) -> Tensor:
    x = _embed(spec, w, image)
    prefix = int(spec.class_token) + int(spec.distilled) + spec.reg_tokens
    scores: Tensor | None = None
    for i, block in enumerate(spec.blocks):
        at, select = f"blocks.{i}.", block.select
        if select and select.before == "attn":
            assert scores is not None
            x, scores = _select(x, scores, select.keep, prefix, select.fuse)
        if block.has_attn:
            reads = block.attn_reads or range(spec.embed_dim)
            writes = block.attn_writes or range(spec.embed_dim)
            y = torch.zeros(len(x), len(writes), dtype=torch.float64)
            if block.qk_dims:
                read = _norm(x, w, at + "norm1", spec.norm_eps)[:, list(reads)]
                heads, maps = _heads(block, w, at, read)
                y = y + torch.cat(heads, dim=1) @ w[at + "attn.proj.weight"].T
                now = _scores(spec, maps)
                scores = scores + now if scores is not None and _cascades(spec) else now
            y = y + w.get(at + "attn.proj.bias", torch.zeros(()))
            y = y * w.get(at + "ls1.gamma", torch.ones(()))
            x = x.clone()
            for column, channel in enumerate(writes):
                x[:, channel] += y[:, column]
        if select and select.before == "mlp":
            assert scores is not None
            x, scores = _select(x, scores, select.keep, prefix, select.fuse)
        if block.has_mlp:
            reads = block.mlp_reads or range(spec.embed_dim)
            writes = block.mlp_writes or range(spec.embed_dim)
            y = torch.zeros(len(x), len(writes), dtype=torch.float64)
            if block.mlp_dim:
                hidden = _linear(_norm(x, w, at + "norm2", spec.norm_eps)[:, list(reads)], w, at + "mlp.fc1")
                y = y + _act(spec.act, hidden) @ w[at + "mlp.fc2.weight"].T
            y = y + w.get(at + "mlp.fc2.bias", torch.zeros(()))
            y = y * w.get(at + "ls2.gamma", torch.ones(()))
            x = x.clone()
            for column, channel in enumerate(writes):
                x[:, channel] += y[:, column]
    return _head(spec, w, x, prefix)


def _embed(spec: ViTSpec, w: State, image: Tensor) -> Tensor:
    (down, across), (p, q) = spec.grid_size, spec.patch_size
    if spec.dynamic_img_pad:
        padded = torch.zeros(len(image), down * p, across * q, dtype=image.dtype)
        padded[:, : image.shape[1], : image.shape[2]] = image
        image = padded
    kernel = w["patch_embed.proj.weight"].flatten(1)
    patches = [image[:, r * p : r * p + p, c * q : c * q + q].flatten() for r in range(down) for c in range(across)]
    x = torch.stack([kernel @ patch for patch in patches]) + w.get("patch_embed.proj.bias", torch.zeros(()))
    x = _norm(x, w, "patch_embed.norm", spec.norm_eps)
    tokens = [w[name][0] for name in ("cls_token", "dist_token", "reg_token") if name in w]
    positions = w["pos_embed"][0]
    x = torch.cat([*tokens, x + positions]) if spec.no_embed_class else torch.cat([*tokens, x]) + positions
    return _norm(x, w, "norm_pre", spec.norm_eps)


def _heads(block: object, w: State, at: str, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    qk_dims, v_dims, scale = block.qk_dims, block.v_dims, block.attn_scale  # type: ignore[attr-defined]
    rows = _linear(x, w, at + "attn.qkv")
    q, k, v = 0, sum(qk_dims), 2 * sum(qk_dims)
    outs, maps = [], []
    for dqk, dv in zip(qk_dims, v_dims):
        logits = scale * rows[:, q : q + dqk] @ rows[:, k : k + dqk].T
        weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
        maps.append(weights / weights.sum(dim=1, keepdim=True))
        outs.append(maps[-1] @ rows[:, v : v + dv])
        q, k, v = q + dqk, k + dqk, v + dv
    return outs, maps


def _cascades(spec: ViTSpec) -> bool:
    return any(block.select is not None and block.select.cascade for block in spec.blocks)


def _scores(spec: ViTSpec, maps: list[Tensor]) -> Tensor:
    rules = {block.select.rule for block in spec.blocks if block.select}
    if rules == {"class_attention"}:
        return torch.stack([m[0] for m in maps]).sum(dim=0)
    return torch.stack([m.max(dim=0).values for m in maps]).sum(dim=0)


def _select(x: Tensor, scores: Tensor, keep: int, prefix: int, fuse: bool) -> tuple[Tensor, Tensor]:
    ranked = sorted(range(prefix, len(x)), key=lambda n: (-float(scores[n]), n))
    kept, dropped = list(range(prefix)) + sorted(ranked[:keep]), ranked[keep:]
    out, out_scores = [x[n] for n in kept], [scores[n] for n in kept]
    if fuse:
        total = torch.stack([scores[n] for n in dropped]).sum() if dropped else torch.zeros((), dtype=torch.float64)
        mean = sum((scores[n] * x[n] for n in dropped), torch.zeros_like(x[0]))
        out.append(mean / total if dropped else mean)
        out_scores.append(total)
    return torch.stack(out), torch.stack(out_scores)


def _head(spec: ViTSpec, w: State, x: Tensor, prefix: int) -> Tensor:
    x = _norm(x, w, "norm", spec.norm_eps)
    if spec.distilled:
        if not spec.num_classes:
            return (x[0] + x[1]) / 2
        return (_linear(x[0], w, "head") + _linear(x[1], w, "head_dist")) / 2
    tokens = x if spec.pool_include_prefix else x[prefix:]
    if spec.global_pool == "map":
        x = _attn_pool(spec, w, tokens)
    elif spec.global_pool == "token":
        x = x[0]
    elif spec.global_pool:
        mean, most = tokens.mean(dim=0), tokens.max(dim=0).values
        x = {"avg": mean, "max": most, "avgmax": (mean + most) / 2}[spec.global_pool]
    x = _norm(x, w, "fc_norm", spec.norm_eps)
    return _linear(x, w, "head") if spec.num_classes else x


def _attn_pool(spec: ViTSpec, w: State, x: Tensor) -> Tensor:
    assert spec.attn_pool is not None
    width = spec.embed_dim // spec.attn_pool.num_heads
    query = _linear(w["attn_pool.latent"][0], w, "attn_pool.q")
    rows = _linear(x, w, "attn_pool.kv")
    outs = []
    for start in range(0, spec.embed_dim, width):
        q, k = query[:, start : start + width], rows[:, start : start + width]
        v = rows[:, spec.embed_dim + start : spec.embed_dim + start + width]
        outs.append(torch.softmax(q @ k.T / math.sqrt(width), dim=1) @ v)
    y = _linear(torch.cat(outs, dim=1), w, "attn_pool.proj")
    hidden = _act(spec.act, _linear(_norm(y, w, "attn_pool.norm", spec.norm_eps), w, "attn_pool.mlp.fc1"))
    return (y + _linear(hidden, w, "attn_pool.mlp.fc2"))[0]


def _linear(x: Tensor, w: State, name: str) -> Tensor:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", torch.zeros(()))


def _norm(x: Tensor, w: State, name: str, eps: float) -> Tensor:
    if name + ".weight" not in w:
        return x
    centred = x - x.mean(dim=-1, keepdim=True)
    spread = torch.sqrt((centred**2).mean(dim=-1, keepdim=True) + eps)
    return centred / spread * w[name + ".weight"] + w[name + ".bias"]


def _act(kind: str, x: Tensor) -> Tensor:
    if kind == "relu":
        return x * (x > 0)
    if kind == "quick_gelu":
        return x / (1 + torch.exp(-1.702 * x))
    if kind == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2
