"""Kernels for pruned Vision Transformers: one folder an op, one contract, one reference, one kernel a backend.

This package knows nothing of pruning or models: ops take tensors, head tables and channel lists.
"""

from ._expect import ContractError, expect
from .fused_mlp import Activation, FusedMlp
from .heads import MAX_HEAD_DIM, HeadTable
from .linear_residual import LinearResidual
from .norm_linear import NormLinear
from .op import Op
from .patch_embed import PatchEmbed
from .pool_head import Pool, PoolHead
from .program import fuse
from .ragged_attention import RaggedAttention
from .select_tokens import SelectTokens
from .target import BACKENDS, BackendName, Launch, MissingExtension, PackedOp, Rebindable, Target
from .token_scores import Rule, TokenScores

__all__ = [
    "BACKENDS",
    "MAX_HEAD_DIM",
    "Activation",
    "BackendName",
    "ContractError",
    "FusedMlp",
    "HeadTable",
    "Launch",
    "LinearResidual",
    "MissingExtension",
    "NormLinear",
    "Op",
    "PackedOp",
    "PatchEmbed",
    "Pool",
    "PoolHead",
    "RaggedAttention",
    "Rebindable",
    "Rule",
    "SelectTokens",
    "Target",
    "TokenScores",
    "expect",
    "fuse",
]
