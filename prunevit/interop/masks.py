"""0/1 masks over a timm ViT, as ViT-Slim and many others leave them, into a compact model that computes the same.

ViT-Slim: Chavan et al., "Vision Transformer Slimming: Multi-Dimension Searching in Continuous Optimization Space",
CVPR 2022.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedModel, expect
from ..models.block import ACTIVATIONS
from ..models.from_timm import as_pruned
from ..models.vit import PrunedViT
from ..pruning import Plan, compact
from ..pruning.plan import BlockPlan
from ..pruning.provenance import with_pruning
from ..spec import BlockSpec

_NAME = re.compile(r"blocks\.(\d+)\.(attn|attn\.qk|attn\.v|mlp)")


def from_masks(
    model: nn.Module, masks: Mapping[str, Tensor], *, on: Literal["activations", "weights"] = "activations"
) -> PrunedViT:
    """The compact model of a timm ViT (or a PrunedViT) under masks; ``model`` is left as it is.

    ``masks`` go by name: ``blocks.i.attn`` (queries, keys and values alike), ``blocks.i.attn.qk``, ``blocks.i.attn.v``
    and ``blocks.i.mlp``; what has no mask is kept, and what has several is kept where all of them keep it. An attention
    mask is [H, D], one number per head [H] or [H, 1], one for each width of all heads [1, D], [H · D], or ViT-Slim's
    [1, 1, H, 1, D]; an MLP mask is [F].

    ``on="activations"``: a masked number is zero after its linear and activation. ``on="weights"``: only the masked
    rows of qkv and fc1 are zero and their biases live, so that a masked neuron is the constant act(b1); constants are
    folded into the biases of proj and fc2.

    Raises :class:`InputError` for masks of other names, shapes or values.
    """
    expect(on in ("activations", "weights"), InputError, "masks on activations or weights", got=on)
    dense = copy.deepcopy(as_pruned(model))
    for i, block in enumerate(dense.spec.blocks):
        expect(block.select is None, InputError, "a model without token selection", got=f"one in block {i}")
    checked = {name: _checked(name, mask, dense) for name, mask in masks.items()}
    kept = []
    with torch.no_grad():
        for i, spec in enumerate(dense.spec.blocks):
            qk = checked.get(f"blocks.{i}.attn.qk", _all(spec.qk_dims))
            v = checked.get(f"blocks.{i}.attn.v", _all(spec.v_dims))
            if (both := checked.get(f"blocks.{i}.attn")) is not None:
                qk, v = ([mask & shared for mask, shared in zip(masks, both)] for masks in (qk, v))
            (hidden,) = checked.get(f"blocks.{i}.mlp", _all((spec.mlp_dim,)))
            masked = _Masked(dense, i, spec, [mask.clone() for mask in qk], v, hidden)
            if on == "weights":
                masked.fold_constants()
            kept.append(masked.plan())
    small = compact(dense, Plan(dense=dense.spec, channels=tuple(range(dense.spec.embed_dim)), blocks=tuple(kept)))
    small.provenance = with_pruning(small.provenance, ["masks"], {"method": "masks", "on": on})
    return small


@dataclass
class _Masked:
    """One block of the dense model and its masks, one for each head; folds change the model."""

    dense: PrunedViT
    index: int
    spec: BlockSpec
    qk: list[Tensor]
    v: list[Tensor]
    hidden: Tensor

    @property
    def block(self) -> Any:
        return self.dense.blocks[self.index]

    def plan(self) -> BlockPlan:
        """Heads whose values are all masked add nothing and go; without a query-key pair a head averages its values."""
        heads = [h for h, v in enumerate(self.v) if bool(v.any())]
        for h in heads:
            if not bool(self.qk[h].any()):
                self.qk[h][0] = True
                row = sum(self.spec.qk_dims[:h])
                self.block.attn.qkv.weight[row] = 0  # a score of zero for every key
                if self.block.attn.qkv.bias is not None:
                    self.block.attn.qkv.bias[row] = 0
        return BlockPlan(
            heads=tuple(heads),
            qk=tuple(_indices(self.qk[h]) for h in heads),
            v=tuple(_indices(self.v[h]) for h in heads),
            mlp=_indices(self.hidden),
            has_attn=self.spec.has_attn,
            has_mlp=self.spec.has_mlp,
        )

    def fold_constants(self) -> None:
        """What masked rows leave behind: act(b1) from the MLP, b_v from attention, whose rows sum to one.

        A query-key pair of constants adds the same to every score, which no softmax sees.
        """
        attn, mlp, spec = self.block.attn, self.block.mlp, self.dense.spec
        if self.spec.qk_dims and attn.qkv.bias is not None:
            values = attn.qkv.bias[2 * sum(self.spec.qk_dims) :]
            self._add("attn.proj", attn.proj, torch.where(torch.cat(self.v).to(values.device), 0, values))
        if self.spec.mlp_dim:
            bias = torch.zeros_like(mlp.fc1.weight[:, 0]) if mlp.fc1.bias is None else mlp.fc1.bias
            constant = ACTIVATIONS[spec.act]()(bias)
            self._add("mlp.fc2", mlp.fc2, torch.where(self.hidden.to(constant.device), 0, constant))

    def _add(self, name: str, linear: Any, constant: Tensor) -> None:
        moved = linear.weight @ constant
        if linear.bias is None:
            where = f"blocks.{self.index}.{name}"
            if bool(moved.any()):
                raise UnsupportedModel(f"{where} has no bias: expected one, to take what masked weights leave behind")
            return
        linear.bias += moved


def _checked(name: str, mask: Tensor, dense: PrunedViT) -> list[Tensor]:
    """A mask as booleans, one tensor a head; an MLP's is alone."""
    found = _NAME.fullmatch(name)
    where = "masks named blocks.i.attn, blocks.i.attn.qk, blocks.i.attn.v or blocks.i.mlp"
    expect(found is not None and int(found[1]) < dense.spec.depth, InputError, where, got=name)
    assert found is not None
    block = dense.spec.blocks[int(found[1])]
    expect(isinstance(mask, Tensor), InputError, f"{name} as a tensor", got=type(mask).__name__)
    values = mask.detach().cpu()
    expect(bool(((values == 0) | (values == 1)).all()), InputError, f"zeros and ones in {name}", got="other values")
    values = values != 0
    if found[2] == "mlp":
        expect(values.numel() == block.mlp_dim, InputError, f"{name} of {block.mlp_dim} neurons", got=values.numel())
        return [values.reshape(-1)]
    dims = block.v_dims if found[2] == "attn.v" else block.qk_dims
    heads, width = len(dims), max(dims, default=0)
    shared = found[2] == "attn" and block.qk_dims != block.v_dims
    expect(len(set(dims)) <= 1 and not shared, InputError, f"heads of one width for {name}", got=dims)
    if values.dim() == 5:  # ViT-Slim's, which multiplies [3, B, H, N, D]
        values = values.squeeze(3).squeeze(1).squeeze(0)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {(heads,): (heads, 1), (heads * width,): (heads, width)}
    shape = shapes.get(tuple(values.shape), tuple(values.shape))
    fits = len(shape) == 2 and shape[0] in (1, heads) and shape[1] in (1, width)
    expect(fits, InputError, f"{name} of shape [{heads}, {width}], [{heads}] or [1, {width}]", got=list(mask.shape))
    return list(values.reshape(shape).expand(heads, width).clone())


def _all(dims: Sequence[int]) -> list[Tensor]:
    return [torch.ones(dim, dtype=torch.bool) for dim in dims]


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(mask).flatten().tolist())


def vit_slim_masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks that ViT-Slim's search left in its own model, for :func:`from_masks`.

    They are attributes of its modules (``searched_zeta``), not parameters, so that the model itself is needed.
    Raises :class:`UnsupportedModel` before ``compress`` was called, and for masked patches, which no width expresses.
    """
    masks: dict[str, Tensor] = {}
    for i, block in enumerate(getattr(model, "blocks", ())):
        for part in ("attn", "mlp"):
            module: Any = getattr(block, part)
            if not hasattr(module, "searched_zeta"):
                continue
            where = f"blocks.{i}.{part}"
            if not module.is_searched:
                raise UnsupportedModel(f"{where}.is_searched is False: expected a model that compress was called on")
            if not bool((getattr(module, "searched_patch_zeta", torch.ones(1)) == 1).all()):
                raise UnsupportedModel(f"{where}.searched_patch_zeta masks patches: expected ones")
            masks[where] = module.searched_zeta.detach()
    expect(bool(masks), UnsupportedModel, "ViT-Slim's modules with a searched_zeta", got=type(model).__name__)
    return masks
