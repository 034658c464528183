from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

from prunevit_kernels import ContractError, HeadTable, RaggedAttention, Target, tune
from prunevit_kernels._aot import stand_in_target
from prunevit_kernels._configs import Problem, Tile, candidates, linear_tile
from prunevit_kernels._launch import Call
from prunevit_kernels.ragged_attention._triton import Packed
from prunevit_kernels.tuning import Tuning

TARGET = stand_in_target(torch.bfloat16)
TILE = Tile(block_m=128, block_n=32, warps=8, stages=2)


def buffers(op: RaggedAttention) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(2, 197, op.heads.width, dtype=torch.bfloat16), torch.empty(
        2, 197, op.heads.out_width, dtype=torch.bfloat16
    )


@pytest.fixture
def op() -> RaggedAttention:
    return RaggedAttention(HeadTable.packed([13, 13], [12, 12], align=8))


def test_a_file_comes_back_and_other_machines_stay(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    Tuning("one GPU", {"a m64 n1 k1 bfloat16": TILE}).write(path)
    Tuning("another GPU", {"b m64 n1 k1 bfloat16": Tile(32, 32)}).write(path)
    assert Tuning.read(path, "one GPU").tiles == {"a m64 n1 k1 bfloat16": TILE}
    assert Tuning.read(path, "a GPU that nobody tuned").tiles == {}


@pytest.mark.parametrize(
    "change", [{"block_m": 100}, {"block_k": 128}, {"warps": 64}, {"stages": 0}, {"block_n": "64"}, {"extra": 1}]
)
def test_sizes_that_no_kernel_has_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    Tuning("one GPU", {"key": TILE}).write(path)
    document = json.loads(path.read_text())
    document["machines"]["one GPU"]["key"].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(ContractError, match="key"):
        Tuning.read(path, "one GPU")


def test_a_tuned_tile_is_used(op: RaggedAttention) -> None:
    (default,) = Packed(op, TARGET).calls(*buffers(op))
    tuned = _stand_in(Tuning("one GPU", {default.problem.key("bfloat16"): TILE}))
    (call,) = Packed(op, tuned).calls(*buffers(op))
    assert default.tile != TILE
    assert call.tile == TILE
    assert call.constants["BLOCK_M"] == 128


def test_attention_loops_over_more_keys_than_a_pass_takes(op: RaggedAttention) -> None:
    for keys, one_pass in ((256, True), (257, False)):
        qkv, out = (torch.empty(2, keys, width, dtype=torch.bfloat16) for width in (op.heads.width, op.heads.out_width))
        (call,) = Packed(op, TARGET).calls(qkv, out)
        assert (call.constants["BLOCK_N"] == 0) == one_pass
        assert any(tile.block_n == 256 for tile in candidates(call.problem)) == one_pass
        assert any(tile.block_n < 256 for tile in candidates(call.problem)), "the loop is tried at any length"
        tuned = _stand_in(Tuning("one GPU", {call.problem.key("bfloat16"): Tile(64, 256)}))
        with nullcontext() if one_pass else pytest.raises(ContractError, match="all keys or of at most 128"):
            Packed(op, tuned).calls(qkv, out)


@pytest.mark.parametrize("embed_dim", [64, 153, 192, 307, 345, 384, 768])
def test_many_patches_are_read_as_seldom_as_64_or_128_columns_allow(embed_dim: int) -> None:
    tile = linear_tile(TARGET, Problem("patch_embed", (256 * 196, embed_dim, 768)))
    read = {columns: -(-embed_dim // columns) * (tile.block_m + columns) for columns in (64, 128)}
    assert read[tile.block_n] == min(read.values())


def test_the_fastest_candidate_wins(op: RaggedAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = Packed(op, TARGET)
    (default,) = packed.calls(*buffers(op))
    refused, fastest = candidates(default.problem)[3], candidates(default.problem)[5]
    compiled, loaded, said, kept = list[Call](), list[Tile](), list[str](), list[Tuning]()

    @contextmanager
    def compiling(calls: Iterable[Call], capability: int) -> Iterator[dict[tune.Compilation, Future[None]]]:
        compiled.extend(calls)
        made = {tune.Compilation.of(call): Future[None]() for call in compiled}
        for work, future in made.items():
            future.set_exception(ValueError("too large")) if work.tile == refused else future.set_result(None)
        yield made

    def load(call: Call) -> Tile:
        assert call.constants["BLOCK_M"] == call.tile.block_m
        loaded.append(call.tile)
        return call.tile

    monkeypatch.setattr(tune, "machine_name", lambda device: "one GPU")
    monkeypatch.setattr(tune, "compiling", compiling)
    monkeypatch.setattr(Call, "load", load)
    monkeypatch.setattr(tune, "measure", lambda tile: 1.0 if tile == fastest else 2.0)
    monkeypatch.setattr(tune, "with_tuning", lambda target, tuning: _stand_in(tuning))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    found = tune.tune([(packed, buffers(op))], TARGET, said.append, kept.append)
    assert found.tiles == {default.problem.key("bfloat16"): fastest}
    assert [each.tiles for each in kept] == [found.tiles], "it is handed over as soon as it is known"
    assert refused not in loaded
    assert any("too large" in line for line in said), "the compiler's reason is told"
    assert {call.tile for call in compiled} == {default.tile, *candidates(default.problem)}
    assert packed.target is TARGET


def _stand_in(tuning: Tuning) -> Target:
    target = stand_in_target(torch.bfloat16)
    object.__setattr__(target, "tuning", tuning)
    return target


def test_problems_of_nearly_as_many_rows_share_a_tile() -> None:
    a, b = (Problem("norm_linear", (rows, 528, 307)) for rows in (64 * 197, 65 * 197))
    assert a.key("bfloat16") == b.key("bfloat16") == "norm_linear m16384 n528 k307 bfloat16"
    assert dataclasses.replace(a, sizes=(16385, 528, 307)).key("bfloat16") != a.key("bfloat16")
