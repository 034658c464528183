"""An MLP alone: two linears on kernels and the activation between; norm and residual stay with whoever calls."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..models.block import ACTIVATIONS, act_of
from ..models.parts import mlp_parts
from ..spec import Act
from ._attention import init_linears
from ._module import KernelModule, input_refusal, parts_refusal, tensors_refusal


def mlp_refusal(mlp: Any, name: str) -> str | None:
    """Why kernels cannot compute what this MLP computes, its tensors aside."""
    return parts_refusal(mlp_parts(mlp, name))


class MlpOnKernels(KernelModule):
    """An MLP x [..., in] -> [..., out] on kernels."""

    def refusal(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> str | None:
        reason = input_refusal(x, 2) or self._call_refusal(x, attn_mask, is_causal) or self._own_refusal()
        return reason or tensors_refusal(x, self._tensors())

    def _look(self) -> str | None:
        return super()._look() or mlp_refusal(self, "")

    def _tensors(self) -> tuple[Tensor | None, ...]:
        self_: Any = self
        return self_.fc1.weight, self_.fc1.bias, self_.fc2.weight, self_.fc2.bias

    def forward(self, x: Tensor) -> Tensor:
        reason = self.refusal(x)
        if reason is not None:
            self._tell(reason)
            return super().forward(x)  # type: ignore[no-any-return]
        self_: Any = self
        act = act_of(self_.act)
        y = torch.ops.prunevit.mlp(x.flatten(0, -2)[None], *self._tensors(), act, *self._how)
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]


class FusedMlp(MlpOnKernels, Mlp):  # type: ignore[misc]  # timm is untyped
    """act(x W1ᵀ + b1) W2ᵀ + b2, dropouts after both: x [..., in_features] -> [..., out_features].

    ``act``: gelu, gelu_tanh, quick_gelu or relu. Dropout in training and anything with a gradient run on the reference
    path. Inside a :class:`RaggedBlock` the norm before it and the residual after it run in the same kernel.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        *,
        act: Act = "gelu",
        bias: bool = True,
        drop: float = 0.0,
    ) -> None:
        act_layer = cast("type[nn.GELU]", ACTIVATIONS[act])
        super().__init__(in_features, hidden_features, out_features, act_layer=act_layer, bias=bias, drop=drop)
        init_linears(self)
