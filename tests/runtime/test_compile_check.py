"""The list of what the published shapes compile is whole, and short."""

from __future__ import annotations

import pickle

import torch

from prunevit import shapes
from prunevit.runtime.compile_check import calls_of, specialisations
from prunevit_kernels._aot import stand_in_target
from prunevit_kernels.tune import Compilation


def test_a_shape_asks_for_few_kernels_and_its_batch_sizes_share_them() -> None:
    target = stand_in_target(torch.bfloat16)
    spec = shapes.get("snp_deit_small_1g3")
    works = {batch: set(map(Compilation.of, calls_of(spec, target, [batch]))) for batch in (1, 2, 60, 64, 256)}
    assert works[1] == works[2]
    assert works[60] == works[64] == works[256]
    assert len(works[1] | works[64]) < 25


def test_every_kernel_is_in_the_list_once() -> None:
    works = specialisations(torch.bfloat16, batches=[1])
    assert len(set(works.values())) == len(works)
    kernels = {work.kernel for work in works.values()}
    assert kernels >= {"ragged_attention_kernel", "norm_linear_kernel", "linear_residual_kernel", "patch_embed_kernel"}
    assert kernels >= {"token_scores_kernel", "softmax_sums_kernel", "gather_kept_kernel", "fuse_dropped_kernel"}
    assert pickle.loads(pickle.dumps(list(works.values()))) == list(works.values())
