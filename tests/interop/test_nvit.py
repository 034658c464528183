"""NViT's dim dictionary and weights against a transcription of its network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunevit.errors import CheckpointError, SpecError, UnsupportedModel
from prunevit.interop import from_nvit, spec_from_nvit

from .test_masks import agree

DIM: dict[str, Any] = {"EMB": 20, "QK": [5, 3], "V": [4, 7], "MLP": [11, 30], "head": [3, 2]}
FIELDS = {"img_size": (12, 12), "patch_size": (4, 4), "num_classes": 5}


class Attention(nn.Module):
    def __init__(self, emb: int, qk: int, v: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Module()
        self.qkv.Q, self.qkv.K, self.qkv.V = nn.Linear(emb, qk), nn.Linear(emb, qk), nn.Linear(emb, v)
        self.qkv.token_mask = nn.Parameter(torch.ones(11, 1))
        self.proj = nn.Module()
        self.proj.proj = nn.Linear(v, emb)

    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self.qkv
        q, k, v = (part(x) * parts.token_mask for part in (parts.Q, parts.K, parts.V))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        attention = (q @ k.transpose(-2, -1) * 64**-0.5).softmax(-1)
        out: Any = self.proj
        return out.proj((attention @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class NViT(nn.Module):
    """models.py of NViT: patches as (row, column, channel), two tokens, a pair of logits."""

    def __init__(self) -> None:
        super().__init__()
        emb = DIM["EMB"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(48, emb, 1)
        self.cls_token, self.dist_token = nn.Parameter(torch.zeros(1, 1, emb)), nn.Parameter(torch.zeros(1, 1, emb))
        self.pos_embed = nn.Parameter(torch.zeros(1, 11, emb))
        self.blocks = nn.ModuleList()
        for qk, v, mlp, head in zip(DIM["QK"], DIM["V"], DIM["MLP"], DIM["head"]):
            block = nn.Module()
            block.norm1, block.norm2 = nn.LayerNorm(emb, eps=1e-6), nn.LayerNorm(emb, eps=1e-6)
            block.attn = Attention(emb, qk * head, v * head, head)
            block.mlp = nn.Module()
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(emb, mlp), nn.Linear(mlp, emb)
            self.blocks.append(block)
        self.norm = nn.LayerNorm(emb, eps=1e-6)
        self.head, self.head_dist = nn.Linear(emb, 5), nn.Linear(emb, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = x.reshape(b, 3, 3, 4, 3, 4).permute(0, 3, 5, 1, 2, 4).reshape(b, 48, 3, 3)
        stem: Any = self.patch_embed
        x = stem.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(b, -1, -1), self.dist_token.expand(b, -1, -1), x], 1) + self.pos_embed
        for each in self.blocks:
            block: Any = each
            x = x + block.attn(block.norm1(x))
            x = x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x))))
        x = self.norm(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2  # type: ignore[no-any-return]


def nvit() -> NViT:
    torch.manual_seed(0)
    model = NViT()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "token_mask" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def test_computes_what_nvit_computes() -> None:
    model = nvit()
    ours = from_nvit(DIM, model.state_dict(), **FIELDS)
    assert ours.spec == spec_from_nvit(DIM, **FIELDS)
    assert [block.qk_dims for block in ours.spec.blocks] == [(5, 5, 5), (3, 3)]
    agree(ours, model)


def test_refuses_masked_tokens() -> None:
    model: Any = nvit()
    with torch.no_grad():
        model.blocks[1].attn.qkv.token_mask[3] = 0
    with pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn\.qkv\.token_mask"):
        from_nvit(DIM, model.state_dict(), **FIELDS)


def test_refuses_what_does_not_fit() -> None:
    state = nvit().state_dict()
    with pytest.raises(SpecError, match="dim dictionary with EMB"):
        spec_from_nvit({"EMB": 3})
    with pytest.raises(SpecError, match="dim dictionary with EMB"):
        spec_from_nvit({1: 2, "a": 3})  # type: ignore[dict-item]
    with pytest.raises(SpecError, match="a dim dictionary, got NoneType"):
        spec_from_nvit(None)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="lists of QK, V, MLP, head, one number a block, got"):
        spec_from_nvit({**DIM, "QK": 40})
    with pytest.raises(SpecError, match="lists of one length"):
        spec_from_nvit({**DIM, "V": [4]})
    with pytest.raises(SpecError, match="up to 256 heads"):
        spec_from_nvit({**DIM, "head": [10**12, 1]})
    with pytest.raises(SpecError, match="dim: "):
        spec_from_nvit({**DIM, "EMB": -1})
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv\.K\.weight"):
        from_nvit(DIM, {k: v for k, v in state.items() if k != "blocks.0.attn.qkv.K.weight"}, **FIELDS)
    with pytest.raises(CheckpointError, match="expected shape"):
        from_nvit({**DIM, "MLP": [11, 29]}, state, **FIELDS)
    for name, value in (
        ("blocks.0.attn.qkv.Q.weight", torch.zeros(15, 7)),
        ("patch_embed.proj.weight", torch.zeros(())),
        ("patch_embed.proj.weight", None),
        ("norm.weight", torch.ones(20, dtype=torch.int32)),
    ):
        with pytest.raises(CheckpointError, match=name):
            from_nvit(DIM, {**state, name: value}, **FIELDS)  # type: ignore[dict-item]
