"""SigLIP's attention-pooling head and classifier: timm's own module, as it is, behind the trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunevit_kernels import Launch, Op, Target

from .._costs import head_macs, latent_pool_macs
from ..spec import ViTSpec
from .pack import Weights


class LatentPool(Op):
    """features [B, N, E] are read, out [B, classes or E] is written. Runs in PyTorch on every backend."""

    def __init__(self, spec: ViTSpec, pool: nn.Module, head: nn.Module) -> None:
        self.spec, self.pool, self.head = spec, pool, head
        self.prefix = 0 if spec.pool_include_prefix else spec.num_prefix_tokens
        self.out_dim = spec.num_classes or spec.embed_dim
        self.macs = latent_pool_macs(spec) + head_macs(spec)

    @classmethod
    def of(cls, spec: ViTSpec, pool: nn.Module, weights: Weights) -> LatentPool:
        """From a model's pooling module and its classifier's weights."""
        head: nn.Module = nn.Identity()
        if spec.num_classes:
            head = nn.Linear(spec.embed_dim, spec.num_classes)
            head.load_state_dict({name: weights[f"head.{name}"] for name in ("weight", "bias")})
        return cls(spec, copy.deepcopy(pool).eval(), head.eval())

    def pack(self, target: Target) -> _TorchModules:
        return _TorchModules(self, target)


class _TorchModules:
    def __init__(self, op: LatentPool, target: Target) -> None:
        self.prefix = op.prefix
        self.pool = copy.deepcopy(op.pool).to(target.device, target.dtype)
        self.head = copy.deepcopy(op.head).to(target.device, target.dtype)

    @property
    def bind(self) -> Callable[..., Launch]:
        return self._bind

    def _bind(self, features: Tensor, out: Tensor) -> Launch:
        @torch.no_grad()
        def launch() -> None:
            out.copy_(self.head(self.pool(features[:, self.prefix :])))

        return launch
