"""AutoFormer's subnets: the RETRAIN part of its YAML files, and a supernet's weights cut to a subnet.

Chen et al., "AutoFormer: Searching Transformers for Visual Recognition", ICCV 2021.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from ..errors import CheckpointError, SpecError, UnsupportedModel, expect
from ..models.vit import PrunedViT
from ..spec import BlockSpec, ViTSpec
from .nvit import loaded

HEAD_DIM = 64  # of every head in every subnet (its --change_qkv)
MAX_YAML_BYTES = 2**20
MAX_NUMBER = 256  # heads of a block, or an MLP ratio: a file is untrusted
FIELDS = ("DEPTH", "EMBED_DIM", "MLP_RATIO", "NUM_HEADS")
Config = Mapping[str, Any] | str | os.PathLike[str]


def spec_from_autoformer(config: Config, **fields: Any) -> ViTSpec:
    """The spec of a subnet: a YAML file, what was read from one, or its RETRAIN part alone.

    Its published models average the patch tokens (``--gp``); ``global_pool="token"`` is for those that do not. They
    also have relative positions, which no spec describes: the spec is their shape without them. Raises
    :class:`SpecError`.
    """
    subnet = _subnet(config)
    depth, width = subnet["DEPTH"], subnet["EMBED_DIM"]
    expect(
        isinstance(depth, int) and isinstance(width, int), SpecError, "whole DEPTH and EMBED_DIM", got=(depth, width)
    )
    ratios, heads = subnet["MLP_RATIO"], subnet["NUM_HEADS"]
    for name, values in (("MLP_RATIO", ratios), ("NUM_HEADS", heads)):
        fits = isinstance(values, list) and len(values) == depth
        fits = fits and all(isinstance(value, int | float) and 0 <= value <= MAX_NUMBER for value in values)
        expect(fits, SpecError, f"{name} of {depth} numbers up to {MAX_NUMBER}", got=f"{values!r:.80}")
    try:
        blocks = tuple(
            BlockSpec(
                qk_dims=(HEAD_DIM,) * count,
                v_dims=(HEAD_DIM,) * count,
                attn_scale=HEAD_DIM**-0.5,
                mlp_dim=int(width * ratio),
            )
            for ratio, count in zip(ratios, heads)
        )
        given = {"embed_dim": width, "blocks": blocks, "norm_eps": 1e-5, "global_pool": "avg", **fields}
        return ViTSpec(**given)
    except (SpecError, TypeError, OverflowError) as error:
        raise SpecError(f"RETRAIN: {error}") from None


def from_autoformer(config: Config, state: Mapping[str, Tensor], **fields: Any) -> PrunedViT:
    """A subnet with its supernet's weights: of every tensor the first rows and columns, as AutoFormer shares them.

    Raises :class:`UnsupportedModel` for weights with relative positions, :class:`CheckpointError` for others that the
    subnet does not fit.
    """
    spec = spec_from_autoformer(config, **fields)
    relative = next((name for name in state if "rel_pos_embed" in name), None)
    if relative is not None:
        raise UnsupportedModel(f"{relative}: relative positions; expected a supernet trained without them")
    width = spec.embed_dim

    def part(name: str, *sizes: int | None) -> Tensor:
        expect(isinstance(state.get(name), Tensor), CheckpointError, f"a tensor {name}", got="none")
        tensor = state[name]
        fits = tensor.dim() == len(sizes) and all(s is None or s <= have for s, have in zip(sizes, tensor.shape))
        expect(fits, CheckpointError, f"{name} of at least {sizes}", got=tuple(tensor.shape))
        return tensor[tuple(slice(size) for size in sizes)]

    cut = {
        "cls_token": part("cls_token", 1, 1, width),
        "pos_embed": part("pos_embed", 1, None, width),
        "patch_embed.proj.weight": part("patch_embed_super.proj.weight", width, None, None, None),
        "patch_embed.proj.bias": part("patch_embed_super.proj.bias", width),
        "head.weight": part("head.weight", spec.num_classes, width),
        "head.bias": part("head.bias", spec.num_classes),
    }
    for kind in ("weight", "bias"):
        cut[f"norm.{kind}"] = part(f"norm.{kind}", width)
    for i, block in enumerate(spec.blocks):
        name, values, hidden = f"blocks.{i}", block.v_dim, block.mlp_dim
        for kind in ("weight", "bias"):
            cut[f"{name}.norm1.{kind}"] = part(f"{name}.attn_layer_norm.{kind}", width)
            cut[f"{name}.norm2.{kind}"] = part(f"{name}.ffn_layer_norm.{kind}", width)
        # a supernet's rows are q0 k0 v0 q1 k1 v1 …, so that a prefix has as many of each; its bias is not interleaved
        rows = part(f"{name}.attn.qkv.weight", 3 * values, width)
        cut[f"{name}.attn.qkv.weight"] = torch.cat([rows[which::3] for which in range(3)])
        cut[f"{name}.attn.qkv.bias"] = part(f"{name}.attn.qkv.bias", 3 * values)
        cut[f"{name}.attn.proj.weight"] = part(f"{name}.attn.proj.weight", width, values)
        cut[f"{name}.attn.proj.bias"] = part(f"{name}.attn.proj.bias", width)
        cut[f"{name}.mlp.fc1.weight"] = part(f"{name}.fc1.weight", hidden, width)
        cut[f"{name}.mlp.fc1.bias"] = part(f"{name}.fc1.bias", hidden)
        cut[f"{name}.mlp.fc2.weight"] = part(f"{name}.fc2.weight", width, hidden)
        cut[f"{name}.mlp.fc2.bias"] = part(f"{name}.fc2.bias", width)
    return loaded(spec, cut, {"base_model": "autoformer", "method": "autoformer"})


class _Tree(yaml.SafeLoader):
    """Without aliases, by which a few hundred bytes stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias, which is not read")
        return super().compose_node(parent, index)


def _subnet(config: Config) -> Mapping[str, Any]:
    if isinstance(config, str | os.PathLike):
        try:
            with Path(config).open("rb") as file:
                raw = file.read(MAX_YAML_BYTES + 1)
        except OSError as error:
            raise SpecError(f"{config}: expected a readable file, got {error.strerror}") from None
        expect(len(raw) <= MAX_YAML_BYTES, SpecError, f"at most {MAX_YAML_BYTES} bytes in {config}", got="more")
        try:
            config = yaml.load(raw, Loader=_Tree)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
            raise SpecError(f"{config}: expected YAML, got {error}") from None
    expect(isinstance(config, Mapping), SpecError, "a mapping of AutoFormer's fields", got=type(config).__name__)
    assert isinstance(config, Mapping)
    subnet = config.get("RETRAIN", config)
    absent = [name for name in FIELDS if not isinstance(subnet, Mapping) or name not in subnet]
    expect(not absent, SpecError, f"RETRAIN with {', '.join(FIELDS)}", got=f"no {', '.join(absent)}")
    found: Mapping[str, Any] = subnet
    return found
