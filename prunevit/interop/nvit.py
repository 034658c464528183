"""NViT's pruned DeiT: the ``dim`` dictionary of its checkpoints, and their weights.

Yang et al., "Global Vision Transformer Pruning with Hessian-Aware Saliency", CVPR 2023.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, SpecError, UnsupportedModel, expect
from ..models.tensors import check_state
from ..models.vit import PrunedViT
from ..spec import BlockSpec, ViTSpec

SCALE = 64**-0.5  # NViT keeps DeiT-B's, whatever the widths
MAX_HEADS = 256  # a checkpoint is untrusted: a count is bounded before a list is as long
FIELDS = ("EMB", "QK", "V", "MLP", "head")


def spec_from_nvit(dim: Mapping[str, Any], **fields: Any) -> ViTSpec:
    """The spec of a ``dim`` dictionary: EMB, and for each block QK and V (of one head), MLP and head (how many).

    ``fields`` are the spec's own where they are not a distilled DeiT's at 224 px. Raises :class:`SpecError`.
    """
    expect(isinstance(dim, Mapping), SpecError, "a dim dictionary", got=type(dim).__name__)
    expect(set(dim) == set(FIELDS), SpecError, f"a dim dictionary with {', '.join(FIELDS)}", got=sorted(map(str, dim)))
    columns: list[Sequence[int]] = [dim[name] for name in FIELDS[1:]]
    lists = all(isinstance(column, list | tuple) for column in columns)
    expect(lists, SpecError, f"lists of {', '.join(FIELDS[1:])}, one number a block", got=f"{columns!r:.80}")
    expect(len({len(column) for column in columns}) == 1, SpecError, "lists of one length", got=[*map(len, columns)])
    counts = dim["head"]
    fits = all(isinstance(count, int) and 0 <= count <= MAX_HEADS for count in counts)
    expect(fits, SpecError, f"up to {MAX_HEADS} heads a block", got=f"{counts!r:.80}")
    try:
        blocks = tuple(
            BlockSpec(qk_dims=(qk,) * head, v_dims=(v,) * head, attn_scale=SCALE, mlp_dim=mlp)
            for qk, v, mlp, head in zip(*columns)
        )
        return ViTSpec(**{"embed_dim": dim["EMB"], "blocks": blocks, "distilled": True, **fields})
    except SpecError as error:
        raise SpecError(f"dim: {error}") from None


def from_nvit(dim: Mapping[str, Any], state: Mapping[str, Tensor], **fields: Any) -> PrunedViT:
    """A checkpoint's ``dim`` and ``model`` entries as a PrunedViT. Read them with ``torch.load(weights_only=True)``.

    NViT's network gives a pair of logits; this one gives their mean, as NViT's own evaluation takes it. Raises
    :class:`UnsupportedModel` for a token mask, :class:`CheckpointError` for weights of another shape.
    """
    spec = spec_from_nvit(dim, **fields)
    weights = dict(state)
    converted: dict[str, Tensor] = {}
    for i in range(spec.depth):
        name = f"blocks.{i}.attn"
        mask = weights.pop(f"{name}.qkv.token_mask", torch.ones(1))
        if not isinstance(mask, Tensor) or not bool((mask == 1).all()):
            raise UnsupportedModel(f"{name}.qkv.token_mask masks tokens: expected ones")
        for kind, inside in (("weight", (spec.embed_dim,)), ("bias", ())):
            parts = [_pop(weights, f"{name}.qkv.{part}.{kind}", inside) for part in "QKV"]
            converted[f"{name}.qkv.{kind}"] = torch.cat(parts)
            converted[f"{name}.proj.{kind}"] = _pop(weights, f"{name}.proj.proj.{kind}")
    # its stem unfolds patches as (row, column, channel) before a 1 × 1 convolution
    rows, columns = spec.patch_size
    stem = _pop(weights, "patch_embed.proj.weight", (rows * columns * spec.in_chans, 1, 1))
    converted["patch_embed.proj.weight"] = stem.reshape(-1, rows, columns, spec.in_chans).permute(0, 3, 1, 2)
    return loaded(spec, {**weights, **converted}, {"base_model": "deit_base_distilled_patch16_224", "method": "nvit"})


def _pop(weights: dict[str, Tensor], name: str, inside: tuple[int, ...] | None = None) -> Tensor:
    """A tensor of any number of rows, each of shape ``inside``."""
    expect(isinstance(weights.get(name), Tensor), CheckpointError, f"a tensor {name}", got="none")
    tensor = weights.pop(name)
    fits = inside is None or (tensor.dim() > 0 and tensor.shape[1:] == inside)
    expect(fits, CheckpointError, f"{name} of rows of shape {list(inside or ())}", got=list(tensor.shape))
    return tensor


def loaded(spec: ViTSpec, state: Mapping[str, Tensor], provenance: dict[str, Any]) -> PrunedViT:
    """A PrunedViT in evaluation mode with a copy of ``state``.

    Raises :class:`CheckpointError` for weights of other shapes, and for those that no checkpoint holds: not finite, of
    integers, of several dtypes.
    """
    for name, tensor in state.items():
        expect(isinstance(tensor, Tensor), CheckpointError, f"{name} to be a tensor", got=type(tensor).__name__)
    check_state(spec, state, "state")
    model = PrunedViT(spec, device="meta")
    model.load_state_dict({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, assign=True)
    model.provenance = provenance
    return model.eval()
