"""SigLIP's attention-pooling head and classifier: timm's own module behind the trunk, in PyTorch on every backend."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from prunevit_kernels import ContractError, Op, PackedOp, Target

from ..models.surface import attention_pool, linear_head, norm_of
from ..spec import ViTSpec
from .pack import Weights


@dataclass(frozen=True, eq=False)
class LatentPool(Op):
    """features [B, N, E] are read, out [B, classes or E] is written. The first ``prefix`` tokens are not pooled."""

    pool: nn.Module
    norm: nn.Module
    head: nn.Module
    prefix: int

    @classmethod
    def of(cls, spec: ViTSpec, weights: Weights) -> LatentPool:
        """With copies of a model's weights."""
        with torch.device("meta"):  # weights are given, not drawn
            pool, norm, head = attention_pool(spec), norm_of(spec, spec.fc_norm), linear_head(spec)
        for name, module in (("attn_pool", pool), ("fc_norm", norm), ("head", head)):
            module.load_state_dict({key: weights[f"{name}.{key}"] for key in module.state_dict()}, assign=True)
        return cls(pool.eval(), norm.eval(), head.eval(), spec.num_unpooled_tokens)

    def to(self, target: Target) -> Self:
        parts = (self.pool, self.norm, self.head)
        pool, norm, head = (copy.deepcopy(module).to(target.device, target.dtype) for module in parts)
        return replace(self, pool=pool, norm=norm, head=head)

    def pack(self, target: Target) -> PackedOp:
        return super().pack(replace(target, backend="torch"))

    def check(self, target: Target, features: Tensor, out: Tensor) -> None:
        fits = features.dim() == 3 and out.dim() == 2 and len(features) == len(out) and features.shape[1] > self.prefix
        if not fits:
            what = f"features [B, more than {self.prefix}, E] and out [B, classes or E]"
            raise ContractError(f"expected {what}, got {tuple(features.shape)} and {tuple(out.shape)}")

    def reference(self, features: Tensor, out: Tensor) -> None:
        out.copy_(self.head(self.norm(self.pool(features[:, self.prefix :]))))
