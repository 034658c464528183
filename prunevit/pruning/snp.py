"""SNP: structured neuron-level pruning to preserve attention scores.

Shim et al., "SNP: Structured Neuron-level Pruning to Preserve Attention Scores" (arXiv 2404.11630, §3.2–3.4).

Query-key pairs: Q, K [N, Dqk] of one head on one image, QKᵀ = Σ_j σ_j u_j v_jᵀ. A pair's score is how well its own
rank-one part lies along the leading ones, ω_i = Σ_{j≤γ} |cos(u_j v_jᵀ, q_i k_iᵀ)| = Σ_j |u_j·q_i| |v_j·k_i| /
‖q_i‖‖k_i‖, averaged over images. With Q = Q̂R, K = K̂S the SVD of RSᵀ [Dqk, Dqk] has the same σ and u = Q̂u′, so that
no N×N matrix is ever made. Values and MLP neurons: how unlike the other rows of the layer a row is, ω_i = Σ_j 1 −
|cos(W_i, W_j)|, over the rows of all heads. Residual channels: the same over the rows of each matrix that writes the
stream, averaged.

Our reading: γ is unpublished, and here by default the number of vectors that carry ``energy`` of Σσ²; zero rows have
cosine 0 with everything and would rank as the most precious, so that rows without incoming or outgoing weight are
taken out first and go first; heads and sublayers have no score of their own (combine with another method).

Measured (docs/methods.md): on digits and CIFAR-10 the redundancy formula ranks values and MLP neurons worse than
chance, and channels no better; pairs are ranked well. Pairs by SNP and the rest by magnitude, with a budget for each:
``prune(model, ["snp:qk", "magnitude:v,mlp,channel"], [{"macs": "90%"}, {"macs": "50%"}], data)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .._options import expect_at_least
from ..errors import PruningError, expect
from ..models import PrunedViT
from .groups import Atoms, Group, Kind
from .method import Data, Scorer, images_of, watched_qkv

_DEAD = 1e-6  # of the mean norm of a matrix's rows: what weight decay leaves of an unused neuron is below it


@dataclass(frozen=True)
class SNP(Scorer):
    """``gamma`` leading singular vectors (None: as many as carry ``energy``), on ``images`` calibration images.

    Its formula for values, MLP neurons and channels ranked them no better than chance where it was measured: for these,
    consider magnitude, as in ``["snp:qk", "magnitude:v,mlp,channel"]`` with constraints for each (docs/methods.md).
    """

    gamma: int | None = None
    energy: float = 0.9
    images: int = 64

    groups: ClassVar[tuple[Kind, ...]] = ("qk", "v", "mlp", "channel")
    supports: ClassVar[tuple[Kind, ...]] = groups

    def __post_init__(self) -> None:
        expect(self.gamma is None or self.gamma >= 1, PruningError, "gamma of at least 1", got=self.gamma)
        expect(0 < self.energy <= 1, PruningError, "energy in (0, 1]", got=self.energy)
        expect_at_least(self, "images", 1)

    @torch.no_grad()
    def score(self, model: PrunedViT, groups: Sequence[Group], data: Data | None, seed: int) -> dict[Group, Tensor]:
        pairs = [group for group in groups if group.kind == "qk"]
        scores = self._pairs(model, pairs, data) if pairs else {}
        weights, shapes = dict(model.named_parameters()), model.spec.blocks
        for group in groups:
            at = f"blocks.{group.block}"
            if group.kind == "v" and group not in scores:
                block = shapes[group.block]
                rows = weights[f"{at}.attn.qkv.weight"][2 * sum(block.qk_dims) :]
                heads = redundancy(rows, weights[f"{at}.attn.proj.weight"].T).split(list(block.v_dims))  # type: ignore[no-untyped-call]
                scores |= {g: heads[g.head] for g in groups if g.kind == "v" and g.block == group.block}
            elif group.kind == "mlp":
                scores[group] = redundancy(weights[f"{at}.mlp.fc1.weight"], weights[f"{at}.mlp.fc2.weight"].T)
            elif group.kind == "channel":
                scores[group] = _of_channels(model)
        return scores

    def _pairs(self, model: PrunedViT, groups: Sequence[Group], data: Data | None) -> dict[Group, Tensor]:
        sums = {group: torch.zeros(group.size, dtype=torch.float64) for group in groups}
        count = 0
        with watched_qkv(model) as seen:
            for images in images_of(data, model, self.images, of="snp"):
                model(images)
                count += len(images)
                for i in {group.block for group in groups}:
                    dims = list(model.spec.blocks[i].qk_dims)
                    q, k = (part.split(dims, dim=-1) for part in seen[i][..., : 2 * sum(dims)].chunk(2, dim=-1))  # type: ignore[no-untyped-call]
                    for group in groups:
                        if group.block == i:
                            scores = preserved_scores(q[group.head], k[group.head], self.gamma, self.energy)
                            sums[group] += scores.sum(0).double().cpu()
        return {group: total / count for group, total in sums.items()}


def preserved_scores(q: Tensor, k: Tensor, gamma: int | None, energy: float) -> Tensor:
    """q, k [B, N, D] -> ω [B, D] of each image."""
    wide = torch.promote_types(q.dtype, torch.float32)
    r, s = (torch.linalg.qr(x.to(wide), mode="r").R for x in (q, k))
    u, sigma, vh = torch.linalg.svd(r @ s.mT)
    held = sigma.square().cumsum(-1) / sigma.square().sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    before = F.pad(held[..., :-1], (1, 0))
    # vectors of a zero singular value are any basis of what is left, and mean nothing
    leading = sigma > sigma[..., :1] * torch.finfo(wide).eps * max(q.shape[-2:])
    leading &= (before < energy) if gamma is None else torch.arange(sigma.shape[-1], device=q.device) < gamma
    along = (u.mT @ r).abs() * (vh @ s).abs()  # [B, j, i]
    norms = r.norm(dim=-2) * s.norm(dim=-2)
    scores: Tensor = (along * leading[..., None]).sum(-2) / norms.clamp_min(torch.finfo(wide).tiny)
    return scores


def redundancy(rows: Tensor, outgoing: Tensor) -> Tensor:
    """rows [D, E], outgoing [D, ...] -> ω [D], fp64: Σ_j 1 − |cos(W_i, W_j)| over live rows; −∞ for dead ones."""
    rows, outgoing = rows.detach().double().flatten(1), outgoing.detach().double().flatten(1)
    dead = _dead(rows) | _dead(outgoing)
    unit = F.normalize(rows[~dead])
    score = torch.full((len(rows),), -torch.inf, dtype=torch.float64, device=rows.device)
    score[~dead] = (1 - (unit @ unit.T).abs()).clamp_min(0).sum(1)
    return score.cpu()


def _dead(rows: Tensor) -> Tensor:
    norms: Tensor = rows.norm(dim=1)
    return norms <= _DEAD * norms.mean()


def _of_channels(model: PrunedViT) -> Tensor:
    """Averaged over the matrices that write each channel; a channel dead in one of them counts 0 there."""
    atoms, weights = Atoms.of(model.spec), dict(model.named_parameters())
    total, writers = torch.zeros(2, model.spec.embed_dim, dtype=torch.float64)
    for name, axes in atoms.axes().items():
        if name.endswith(("patch_embed.proj.weight", "attn.proj.weight", "mlp.fc2.weight")) and name in weights:
            channels, rows = axes[0], weights[name]
            assert channels is not None
            total[channels] += redundancy(rows, rows).clamp_min(0)
            writers[channels] += 1
    mean: Tensor = total / writers.clamp_min(1)
    return mean
