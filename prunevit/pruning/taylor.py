"""Taylor: a unit is worth the first-order change of the loss if its output were zero.

Molchanov et al., "Importance Estimation for Neural Network Pruning" (arXiv 1906.10771, §3.1); for heads Michel et al.,
"Are Sixteen Heads Really Better than One?" (arXiv 1905.10650, §4.1). For an activation a that a linear layer reads with
weights w, a · ∂L/∂a = Σ w · ∂L/∂w over what the unit writes, so that gradients of weights suffice. Our reading: a pair
is read by the other side of its own product, hence Σ over its rows of q; a residual channel is read through LayerNorms,
hence Σ over their weights and biases (or over the classifier's columns, where no norm is before it); absolute values
are taken per batch, then summed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .._options import expect_at_least
from ..models import PrunedViT
from .groups import Group
from .method import Data, Scorer, labelled


@dataclass(frozen=True)
class Taylor(Scorer):
    """|Σ w · ∂L/∂w|, L the cross entropy, over at most ``images`` images (None: all of data)."""

    images: int | None = 512

    def __post_init__(self) -> None:
        expect_at_least(self, "images", 1)

    def score(self, model: PrunedViT, groups: Sequence[Group], data: Data | None, seed: int) -> dict[Group, Tensor]:
        parameters = dict(model.named_parameters())
        scores = {group: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        for images, labels in labelled(data, model, self.images, of="taylor"):
            with torch.enable_grad(), _all_trainable(model):
                loss = F.cross_entropy(model(images), labels, reduction="sum")
                grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            change = {
                name: (parameter.detach() * grad).double().cpu()
                for (name, parameter), grad in zip(parameters.items(), grads)
                if grad is not None
            }
            for group in groups:
                scores[group] += _of_group(group, change, model).abs()
        return scores


@contextmanager
def _all_trainable(model: PrunedViT) -> Iterator[None]:
    frozen = [weight for weight in model.parameters() if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _of_group(group: Group, change: dict[str, Tensor], model: PrunedViT) -> Tensor:
    """Σ w · ∂L/∂w over what each unit writes."""
    spec = model.spec
    if group.kind == "channel":
        readers = [part for name, part in change.items() if "norm" in name]
        if not (spec.final_norm or spec.fc_norm):
            readers += [part.sum(0) for name, part in change.items() if name in ("head.weight", "head_dist.weight")]
        return torch.stack(readers).sum(0)
    if group.kind == "sublayer":
        last = "attn.proj." if ".attn." in group.layer else "mlp.fc2."
        parts = ([c.sum() for name, c in change.items() if name.startswith(f"blocks.{i}.{last}")] for i in group.blocks)
        return torch.stack([torch.stack([torch.zeros((), dtype=torch.float64), *part]).sum() for part in parts])
    at, block = f"blocks.{group.block}", spec.blocks[group.block]
    if group.kind == "mlp":
        return change[f"{at}.mlp.fc2.weight"].sum(0)
    if group.kind == "read":
        return change[f"{at}.{'mlp.fc1' if '.mlp.' in group.layer else 'attn.qkv'}.weight"].sum(0)
    if group.kind == "qk":
        start = sum(block.qk_dims[: group.head])
        own = slice(start, start + group.size)
        bias = change.get(f"{at}.attn.qkv.bias")
        pairs = change[f"{at}.attn.qkv.weight"][own].sum(1)
        return pairs if bias is None else pairs + bias[own]
    neurons = torch.split(change[f"{at}.attn.proj.weight"].sum(0), list(block.v_dims))
    return neurons[group.head] if group.kind == "v" else torch.stack([neuron.sum() for neuron in neurons])
