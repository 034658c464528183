"""Kernel-backed modules: drop-in for the blocks of a timm ViT or a PrunedViT, and for models of one's own."""

from __future__ import annotations

from itertools import chain
from typing import Any, TypeVar

from timm.layers import Mlp
from timm.layers.attention import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock
from torch import nn

from prunevit_kernels.library import packs

from ..errors import UnsupportedModel
from ..models.block import Block as EagerBlock
from ..models.block import RaggedAttention as EagerAttention
from ..models.parts import kind_of, made_from_ours
from ._attention import AttentionOnKernels, RaggedAttention
from ._block import EagerBlockOnKernels, RaggedBlock, TimmBlockOnKernels
from ._mlp import FusedMlp, MlpOnKernels
from ._model import MODELS, ModelOnKernels
from ._module import Backend, Check, KernelModule, Options, with_kernels
from ._snapshot import KNOWN

__all__ = ["FusedMlp", "KernelModule", "RaggedAttention", "RaggedBlock", "accelerate", "restore"]

Model = TypeVar("Model", bound=nn.Module)

# what a module becomes: decided by its exact type, since a subclass may compute something else
_KERNEL_BACKED: dict[type[nn.Module], type[KernelModule]] = {
    TimmBlock: with_kernels(TimmBlock, TimmBlockOnKernels, "RaggedBlock"),
    EagerBlock: with_kernels(EagerBlock, EagerBlockOnKernels, "RaggedBlock"),
    TimmAttention: with_kernels(TimmAttention, AttentionOnKernels, "RaggedAttention"),
    EagerAttention: with_kernels(EagerAttention, AttentionOnKernels, "RaggedAttention"),
    Mlp: with_kernels(Mlp, MlpOnKernels, "FusedMlp"),
    **{model: with_kernels(model, ModelOnKernels, model.__name__) for model in MODELS},
}


def accelerate(model: Model, *, backend: Backend = "auto", check: Check = "contents") -> Model:
    """Run the transformer blocks of a model on kernels, in place; returns the model.

    Blocks of timm's ``VisionTransformer``, dense or pruned, and of :class:`PrunedViT` run whole; a timm ``Attention``
    or ``Mlp`` anywhere else runs alone. They keep their calls, parameters, state-dict keys and hooks. What a kernel
    cannot do (masks, dropout in training, gradients, autocast, another dtype or device, a changed submodule) runs as
    before, with one warning for each reason; ``module.refusal(x)`` says the reason, or None.

    ``backend``: ``auto``, ``cpu`` (C++, fp32), ``cuda`` (Triton and CUDA, fp16 and bf16) or ``torch`` (the reference
    ops). ``check``: how a call knows that packed weights are still those of the parameters: ``contents`` compares
    every byte and sees every write; ``versions`` costs nothing, and misses writes through ``.data`` or NumPy.

    Raises :class:`UnsupportedModel` where nothing in the model can run on kernels, or where :func:`restore` does;
    :class:`InputError`.
    """
    options = Options(backend, check)
    restore(model)
    if not _swap(model, options):
        restore(model)
        raise UnsupportedModel(
            f"{type(model).__name__}: expected a timm or prunevit transformer block, a timm Attention or a timm Mlp, "
            "found none"
        )
    return model


def _swap(module: nn.Module, options: Options) -> int:
    kernel_backed = _KERNEL_BACKED.get(type(module))
    if kernel_backed is not None:
        module.__class__ = kernel_backed
    if isinstance(module, KernelModule):
        module.kernel_options = options
        if not isinstance(module, ModelOnKernels):
            return 1  # its parts run inside it
    return sum(_swap(child, options) for child in module.children())


def restore(model: Model) -> Model:
    """Undo :func:`accelerate`, in place; returns the model. Every module is the object that it was.

    What was packed of the model's weights goes. Raises :class:`UnsupportedModel` where a module's class was made from
    the one that :func:`accelerate` gave it (FSDP does so): what that class adds would be lost.
    """
    for name, module in model.named_modules():
        if made_from_ours(module):
            raise UnsupportedModel(
                f"{name or 'the model'} is a {type(module).__name__}, made from the class that accelerate gave it: "
                "expected that one; restore a model before you subclass or shard it"
            )
    packs.drop(chain(model.parameters(), model.buffers()))
    for module in model.modules():
        if isinstance(module, KernelModule):
            module.__dict__.pop("kernel_options", None)
            module.__dict__.pop(KNOWN, None)
            eager: Any = kind_of(module)
            module.__class__ = eager
    return model
