"""AutoFormer's subnets: their YAML as a spec, and a supernet's weights against a transcription of its network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from prunevit.errors import CheckpointError, SpecError, UnsupportedModel
from prunevit.interop import from_autoformer, spec_from_autoformer

from .test_masks import agree

SUBNET: dict[str, Any] = {"DEPTH": 2, "EMBED_DIM": 72, "MLP_RATIO": [0.5, 0.75], "NUM_HEADS": [1, 2]}
FIELDS = {"img_size": (12, 12), "patch_size": (4, 4), "num_classes": 5}


class Supernet(nn.Module):
    """What AutoFormer computes for one sampled subnet: prefixes of all weights, qkv rows taken every third."""

    def __init__(self, gp: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        width, inner = 96, 192
        self.gp = gp
        self.patch_embed_super = nn.Module()
        self.patch_embed_super.proj = nn.Conv2d(3, width, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 10, width))
        self.blocks = nn.ModuleList()
        for _ in range(3):
            block: Any = nn.Module()
            block.attn = nn.Module()
            block.attn.qkv, block.attn.proj = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
            block.attn_layer_norm, block.ffn_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
            block.fc1, block.fc2 = nn.Linear(width, 100), nn.Linear(100, width)
            self.blocks.append(block)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        e = SUBNET["EMBED_DIM"]

        def norm(layer: Any, y: Tensor) -> Tensor:
            return F.layer_norm(y, (e,), layer.weight[:e], layer.bias[:e], 1e-5)

        stem: Any = self.patch_embed_super
        x = F.conv2d(x, stem.proj.weight[:e], stem.proj.bias[:e], stride=4).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token[..., :e].expand(len(x), -1, -1), x], 1) + self.pos_embed[..., :e]
        for each, heads, ratio in zip(self.blocks, SUBNET["NUM_HEADS"], SUBNET["MLP_RATIO"]):
            block: Any = each
            dim, hidden = heads * 64, int(e * ratio)
            prefix = block.attn.qkv.weight[: 3 * dim, :e]
            rows = torch.cat([prefix[i::3] for i in range(3)])
            qkv = F.linear(norm(block.attn_layer_norm, x), rows, block.attn.qkv.bias[: 3 * dim])
            q, k, v = qkv.reshape(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            context = ((q @ k.transpose(-2, -1) * 64**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            x = x + F.linear(context, block.attn.proj.weight[:e, :dim], block.attn.proj.bias[:e])
            h = F.gelu(F.linear(norm(block.ffn_layer_norm, x), block.fc1.weight[:hidden, :e], block.fc1.bias[:hidden]))
            x = x + F.linear(h, block.fc2.weight[:e, :hidden], block.fc2.bias[:e])
        x = norm(self.norm, x)
        return F.linear(x[:, 1:].mean(1) if self.gp else x[:, 0], self.head.weight[:, :e], self.head.bias)


@pytest.mark.parametrize("gp", [True, False])
def test_computes_what_the_subnet_computes(gp: bool) -> None:
    net = Supernet(gp).eval()
    ours = from_autoformer(SUBNET, net.state_dict(), global_pool="avg" if gp else "token", **FIELDS)
    agree(ours, net)


def test_reads_the_yaml(tmp_path: Path) -> None:
    """AutoFormer-T, whose paper gives 5.7 M parameters and 1.3 GMAC."""
    file = tmp_path / "AutoFormer-T.yaml"
    retrain = {
        "MLP_RATIO": [3.5, 3.5, 3.0, 3.5, 3.0, 3.0, 4.0, 4.0, 3.5, 4.0, 3.5, 4.0, 3.5],
        "NUM_HEADS": [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 4, 3, 3],
        "DEPTH": 13,
        "EMBED_DIM": 192,
    }
    file.write_text(yaml.safe_dump({"SUPERNET": {"DEPTH": 14}, "RETRAIN": retrain}))
    spec = spec_from_autoformer(file)
    assert spec == spec_from_autoformer(retrain)
    assert spec.blocks[10].qk_dims == (64,) * 4
    assert spec.blocks[0].mlp_dim == 672
    assert spec.params() == pytest.approx(5.7e6, rel=0.03)
    assert spec.macs() == pytest.approx(1.3e9, rel=0.1)


def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    state = Supernet(True).state_dict()
    with pytest.raises(UnsupportedModel, match="relative positions"):
        from_autoformer(SUBNET, {**state, "blocks.0.attn.rel_pos_embed_k.embeddings_table_v": torch.ones(1)}, **FIELDS)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.fc1\.weight of at least"):
        from_autoformer({**SUBNET, "MLP_RATIO": [2.0, 0.75]}, state, **FIELDS)
    with pytest.raises(SpecError, match="no DEPTH"):
        spec_from_autoformer({"RETRAIN": {"EMBED_DIM": 3, "MLP_RATIO": [], "NUM_HEADS": []}})
    with pytest.raises(SpecError, match="NUM_HEADS of 2 numbers"):
        spec_from_autoformer({**SUBNET, "NUM_HEADS": [1]})
    with pytest.raises(SpecError, match="MLP_RATIO of 2 numbers"):
        spec_from_autoformer({**SUBNET, "MLP_RATIO": ["four", 1.0]})
    with pytest.raises(SpecError, match="up to 256"):
        spec_from_autoformer({**SUBNET, "NUM_HEADS": [10**12, 1]})
    broken = tmp_path / "broken.yaml"
    broken.write_text("RETRAIN: [")
    with pytest.raises(SpecError, match="expected YAML"):
        spec_from_autoformer(broken)
    with pytest.raises(SpecError, match=r"missing\.yaml: expected a readable file, got No such file"):
        spec_from_autoformer(tmp_path / "missing.yaml")


BOMB = "a: &a [1,1]\n" + "".join(f"{y}: &{y} [*{x},*{x}]\n" for x, y in zip("abcdefgh", "bcdefghi"))
YAML = "DEPTH: 1\nEMBED_DIM: 64\nMLP_RATIO: [4]\nNUM_HEADS: [1]\n"


@pytest.mark.parametrize(
    "text",
    [
        *(BOMB, "[" * 50_000, "DEPTH: " + "9" * 5000, "DEPTH: 2020-99-99", "DEPTH: !!int x", "DEPTH: !!bool x"),
        YAML.replace("64", "1" + "0" * 400).replace("[4]", "[3.5]"),
    ],
)
def test_refuses_hostile_yaml(text: str, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(YAML)
    assert spec_from_autoformer(tmp_path / "good.yaml").embed_dim == 64
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SpecError):
        spec_from_autoformer(tmp_path / "bad.yaml")


@pytest.mark.parametrize("value", [None, torch.ones(96, dtype=torch.int64), torch.full((96,), torch.nan)])
def test_refuses_weights_that_no_checkpoint_holds(value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        from_autoformer(SUBNET, {**Supernet(True).state_dict(), "norm.weight": value}, **FIELDS)
