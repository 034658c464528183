"""The dense-sized model that computes what a plan keeps: the other side of every equivalence test, and of lifting.

Nothing that is dropped may leak. A dropped neuron's *outgoing* weights are zero, so that gelu(b1) goes nowhere; a
dropped query-key pair is zero in q and in k; a dropped residual channel is written by nobody, and norms take their
statistics over the kept channels only (a plain LayerNorm would divide by the dense width); a dropped token is a key
that scores −∞.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ..errors import PruningError, expect
from ..models import PrunedViT
from ..models.block import Block, RaggedAttention, read_channels, write_channels
from ..models.from_timm import as_pruned
from ..spec import TokenSelect
from .plan import Plan, same_shape
from .surgery import kept_indices, norm_weights


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """See :meth:`Plan.mask`."""
    dense = as_pruned(model)
    fits = same_shape(dense.spec, plan.dense)
    expect(fits, PruningError, "a plan made for a model of this shape", got=f"one of width {plan.dense.embed_dim}")
    copy = _without_selection(dense, plan)
    copy.load_state_dict(dense.state_dict())
    with torch.no_grad():
        _zero_dropped(copy, plan)
        present = dict(copy.named_parameters())
        for name in norm_weights(plan):
            if name in present:
                present[name].mul_(plan.norm_gain)
    return _finish(copy, plan)


def lifted(compact: nn.Module, plan: Plan) -> nn.Module:
    """See :meth:`Plan.lift`."""
    small = as_pruned(compact)
    fits = same_shape(small.spec, plan.spec())
    expect(fits, PruningError, "the model that this plan leaves", got=f"one of width {small.spec.embed_dim}")
    large = _without_selection(small, plan)
    kept = dict(kept_indices(plan))
    state = {name: torch.zeros_like(weight) for name, weight in large.state_dict().items()}
    for name, weight in small.state_dict().items():
        index = [
            torch.arange(n, device=weight.device) if i is None else i.to(weight.device)
            for i, n in zip(kept.get(name, (None,) * weight.dim()), weight.shape)
        ]
        state[name][torch.meshgrid(*index, indexing="ij")] = weight
    large.load_state_dict(state)
    return _finish(large, plan)


class MaskedLayerNorm(nn.Module):
    """LayerNorm with the statistics of the kept channels; dropped channels come out as zero."""

    kept: Tensor

    def __init__(self, norm: nn.LayerNorm, kept: Tensor) -> None:
        super().__init__()
        mask = torch.zeros_like(norm.weight).index_fill_(0, kept.to(norm.weight.device), 1.0)
        self.register_buffer("kept", mask)
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        count = self.kept.sum()
        centred = (x - (x * self.kept).sum(-1, keepdim=True) / count) * self.kept
        variance = centred.square().sum(-1, keepdim=True) / count
        return (centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias) * self.kept


class TokenMaskedViT(nn.Module):
    """A dense-sized model whose dropped tokens stay where they are, as keys that score −∞."""

    def __init__(self, model: PrunedViT, plan: Plan) -> None:
        super().__init__()
        self.model = model
        spec = plan.spec()
        assert spec.selection is not None
        self.rule, self.cascade = spec.selection
        self.selects = [block.select for block in spec.blocks]
        self.heads = [block.heads for block in plan.blocks]

    def forward(self, images: Tensor) -> Tensor:
        x = self.model._embed(images)
        alive = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        scores = x.new_zeros(alive.shape)
        for module, select, heads in zip(self.model.blocks, self.selects, self.heads):
            block = cast("Block", module)
            if select is not None and select.before == "attn":
                x, alive, scores = self.drop(select, x, alive, scores)
            if block.attn is not None:
                y, latest = self.attend(block.attn, read_channels(block.norm1(x), block.attn_reads), alive, heads)
                scores = scores if latest is None else latest + scores if self.cascade else latest
                x = write_channels(x, block.ls1(y), block.attn_writes)
            if select is not None and select.before == "mlp":
                x, alive, scores = self.drop(select, x, alive, scores)
            if block.mlp is not None:
                y = block.mlp(read_channels(block.norm2(x), block.mlp_reads))
                x = write_channels(x, block.ls2(y), block.mlp_writes)
        tokens = self.model.norm(x)
        # every image keeps as many: the head pools over those alone
        logits: Tensor = self.model.forward_head(tokens[alive].view(len(x), -1, x.shape[-1]))
        return logits

    def attend(
        self, attn: RaggedAttention, x: Tensor, alive: Tensor, heads: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output, and what each token receives from the kept heads."""
        if attn.qkv is None:
            return attn.proj(x), None
        width = sum(attn.qk_dims)
        q, k, v = attn.qkv(x).split([width, width, sum(attn.v_dims)], dim=-1)
        out, received = [], None
        parts = zip(q.split(attn.qk_dims, -1), k.split(attn.qk_dims, -1), v.split(attn.v_dims, -1))
        for h, (q_h, k_h, v_h) in enumerate(parts):
            logits = (q_h @ k_h.mT * attn.scale).masked_fill(~alive[:, None, :], -torch.inf)
            p = logits.softmax(-1)
            out.append(p @ v_h)
            if h in heads:
                seen = p[:, 0] if self.rule == "class_attention" else (p * alive[:, :, None]).amax(1)
                received = seen if received is None else received + seen
        return attn.proj(torch.cat(out, -1)), received

    def drop(self, select: TokenSelect, x: Tensor, alive: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        prefix = self.model.num_prefix_tokens
        ranked = scores.masked_fill(~alive, -torch.inf)[:, prefix:]
        best = ranked.argsort(dim=1, descending=True, stable=True)[:, : select.keep] + prefix
        stays = torch.zeros_like(alive).scatter_(1, best, True)
        stays[:, :prefix] = True
        if not select.fuse:
            return x, stays, scores
        weight = torch.where(alive & ~stays, scores, 0.0)
        total = weight.sum(1, keepdim=True)
        fused = torch.einsum("bn,bne->be", weight, x)[:, None] / total.clamp_min(1e-20)[..., None]
        one = torch.ones_like(alive[:, :1])
        return torch.cat([x, fused], 1), torch.cat([stays, one], 1), torch.cat([scores, total], 1)


def _without_selection(model: PrunedViT, plan: Plan) -> PrunedViT:
    """An uninitialised dense-sized model; selection is :class:`TokenMaskedViT`'s."""
    blocks = tuple(block.model_copy(update={"select": None}) for block in plan.dense.blocks)
    like = model.pos_embed
    spec = model.spec.replace(embed_dim=plan.dense.embed_dim, blocks=blocks)
    return PrunedViT(spec, device=like.device, dtype=like.dtype)


def _zero_dropped(model: PrunedViT, plan: Plan) -> None:
    kept = dict(kept_indices(plan))

    def zero(name: str, axis: int) -> None:
        parameter = model.get_parameter(name)
        index = kept[name][axis]
        assert index is not None
        mask = torch.zeros(parameter.shape[axis], device=parameter.device).index_fill_(0, index.to(parameter.device), 1)
        shape = [1] * parameter.dim()
        shape[axis] = -1
        parameter.mul_(mask.view(shape).to(parameter.dtype))

    present = {name for name, _ in model.named_parameters()}
    for name in kept.keys() & present:
        module = name.rpartition(".")[0]
        if module.endswith(("attn.proj", "mlp.fc2")) and name.endswith("weight"):
            zero(name, 1)  # what a dropped neuron would write
        if module.endswith("attn.qkv"):
            zero(name, 0)  # dropped pairs score nothing; v's rows are zeroed along
        if module.endswith(("attn.qkv", "mlp.fc1")) and name.endswith("weight"):
            zero(name, 1)  # channels that this matrix alone no longer reads
        if not module.endswith(("attn.qkv", "mlp.fc1", "head", "head_dist")):
            zero(name, 2 if name in ("cls_token", "dist_token", "reg_token", "pos_embed") else 0)  # residual channels
    for i, block in enumerate(plan.blocks):
        for stays, part in ((block.has_attn, "attn.proj"), (block.has_mlp, "mlp.fc2")):
            for name in (f"blocks.{i}.{part}.weight", f"blocks.{i}.{part}.bias"):
                if not stays and name in present:
                    model.get_parameter(name).zero_()


def _finish(model: PrunedViT, plan: Plan) -> nn.Module:
    channels, modules = torch.tensor(plan.channels), dict(model.named_modules())
    for name in norm_weights(plan) if len(channels) < plan.dense.embed_dim else ():
        path = name.removesuffix(".weight")
        if isinstance(norm := modules.get(path), nn.LayerNorm):
            model.set_submodule(path, MaskedLayerNorm(norm, channels))
    model.eval()
    return model if plan.spec().selection is None else TokenMaskedViT(model, plan).eval()
