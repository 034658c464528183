"""What a GPU's kernels pad is counted from their own tiles."""

from __future__ import annotations

import pytest
import torch

from prunevit.runtime.waste import cuda_macs
from prunevit_kernels import HeadTable, Rule, TokenScores
from prunevit_kernels._aot import stand_in_target


@pytest.mark.parametrize("rule", ["max_attention", "class_attention"])
def test_token_scores_are_computed_twice_in_whole_blocks_at_the_widest_heads_width(rule: Rule) -> None:
    target, heads = stand_in_target(torch.bfloat16), HeadTable.packed([13, 25], [12, 12], align=8)
    op = TokenScores(heads, rule)
    qkv, scores = torch.empty(2, 197, heads.width, dtype=torch.bfloat16), torch.empty(2, 197)
    packed = op.pack(target)
    tile = packed.calls(qkv, scores)[0].tile  # type: ignore[attr-defined]
    queries = 1 if rule == "class_attention" else 197
    blocks = -(-queries // tile.block_m) * tile.block_m * -(-197 // tile.block_n) * tile.block_n
    assert cuda_macs(op, packed, (qkv, scores)) == 2 * 2 * 2 * blocks * 32
