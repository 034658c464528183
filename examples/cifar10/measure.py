"""What is measured of a model: accuracy in prunevit's runtime, costs, attention maps, and what scores agree on."""

from __future__ import annotations

from typing import Any

import torch
from images import Batches, Images
from methods import Lab
from scores import scores_of
from torch import Tensor

import prunevit
from prunevit.models import PrunedViT
from prunevit.pruning import groups_of
from prunevit.pruning.gohsp import attention_maps
from prunevit.pruning.method import watched_qkv


def accuracy(model: PrunedViT, images: Images) -> float:
    """The share of images whose class is the most likely one, computed by the runtime."""
    runtime = prunevit.Runtime(model, device="cpu", threads=torch.get_num_threads())
    right = sum(int((runtime(x).argmax(1) == labels).sum()) for x, labels in Batches(images, 100))
    return right / len(images)


def costs(model: PrunedViT, dense: PrunedViT) -> dict[str, float]:
    """MACs and parameters, and what share of the dense model's they are."""
    macs, params = model.spec.macs(), model.spec.params()
    shares = {"macs_share": macs / dense.spec.macs(), "params_share": params / dense.spec.params()}
    return {"macs": macs, "params": params, **shares}


@torch.no_grad()
def maps_of(model: PrunedViT, images: Tensor) -> list[Tensor]:
    """The attention of each layer, [B, H, N, N]."""
    with watched_qkv(model) as seen:
        model.eval()(images)
    return [attention_maps(qkv, model, i) for i, qkv in sorted(seen.items())]


def map_error(model: PrunedViT, dense: PrunedViT, images: Tensor) -> float:
    """‖A′ − A‖ / ‖A‖ of each layer's attention, averaged over layers. All heads are there in both."""
    pairs = zip(maps_of(model, images), maps_of(dense, images))
    return float(torch.stack([(ours - theirs).norm() / theirs.norm() for ours, theirs in pairs]).mean())


def agreement(lab: Lab, kind: Any, one: str, other: str, seed: int) -> float:
    """Spearman's rank correlation of two scores within each group of a kind, averaged over groups."""
    spec = lab.dense.spec
    groups = groups_of(spec, (kind,))
    ranks = []
    for name in (one, other):
        scores = scores_of(name, lab.dense, groups, lab.shown(seed), seed)
        ranks.append([scores[group].argsort().argsort().double() for group in groups])
    return float(torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks)]).mean())
