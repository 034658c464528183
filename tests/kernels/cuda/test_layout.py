"""Index and tile arithmetic of csrc/cuda, exhaustively, and that packing puts weights where it says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from prunevit_kernels.fused_mlp._cuda import PackedWeights, pack_w1, pack_w2, unpack_w1, unpack_w2
from tests.kernels.cuda.emulation import build, draw


def test_every_index_function_and_every_plan(tmp_path: Path) -> None:
    done = subprocess.run([build("check_layout", tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("holds") == 9


def test_activations_against_double_precision(tmp_path: Path) -> None:
    done = subprocess.run([build("check_activations", tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def element_offset(rows: int, row: int, column: int) -> int:
    """layout.h's element_offset, in elements."""
    panel, inside = divmod(column, 64)
    return panel * rows * 64 + row * 64 + ((inside // 8) ^ row % 8) * 8 + inside % 8


@pytest.mark.parametrize(("hidden", "in_dim", "out_dim"), [(70, 37, 37), (1, 1, 1), (64, 64, 16), (130, 153, 90)])
def test_packed_weights_lie_where_the_kernels_look(hidden: int, in_dim: int, out_dim: int) -> None:
    w1, w2 = torch.randn(hidden, in_dim), torch.randn(out_dim, hidden)
    packed1, packed2 = pack_w1(w1).flatten(), pack_w2(w2).flatten()
    panels, out_padded = -(-in_dim // 64), -(-out_dim // 16) * 16
    assert packed1.numel() == -(-hidden // 64) * panels * 64 * 64
    assert packed2.numel() == -(-hidden // 64) * out_padded * 64
    found1 = {
        f // 64 * panels * 4096 + element_offset(64, f % 64, k): w1[f, k] for f in range(hidden) for k in range(in_dim)
    }
    found2 = {
        f // 64 * out_padded * 64 + element_offset(out_padded, n, f % 64): w2[n, f]
        for f in range(hidden)
        for n in range(out_dim)
    }
    for packed, found in ((packed1, found1), (packed2, found2)):
        expected = torch.zeros_like(packed)
        expected[torch.tensor(list(found))] = torch.stack(list(found.values()))
        assert torch.equal(packed, expected)


@pytest.mark.parametrize(("hidden", "in_dim", "out_dim"), [(70, 37, 37), (1, 1, 1), (64, 64, 16), (130, 153, 90)])
def test_what_is_unpacked_was_packed(hidden: int, in_dim: int, out_dim: int) -> None:
    w1, w2 = torch.randn(hidden, in_dim), torch.randn(out_dim, hidden)
    assert torch.equal(unpack_w1(pack_w1(w1), hidden, in_dim), w1)
    assert torch.equal(unpack_w2(pack_w2(w2), out_dim, hidden), w2)


def test_absent_biases_and_layer_scale_are_zeros_and_ones() -> None:
    weights = PackedWeights(draw(37, 70, biases=False), torch.device("cpu"), torch.float16)
    assert torch.equal(weights.b1, torch.zeros(128))
    assert torch.equal(weights.b2, torch.zeros(48))
    assert torch.equal(weights.gamma[:37], torch.ones(37))
    assert set(weights.buffers()) == {"w1", "w2", "b1", "b2", "gamma"}


def test_padding_is_told() -> None:
    op = draw(153, 383)
    weights = PackedWeights(op, torch.device("cpu"), torch.bfloat16)
    assert weights.padding(op) == (384 * 192 + 160 * 384 - 2 * 153 * 383) * 2
