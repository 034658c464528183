"""The C++ extension's door: what it refuses, by name, before anything is read or written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from prunevit_kernels import MissingExtension, NormLinear, Target, cpu


def test_the_native_door_refuses_what_would_be_out_of_bounds() -> None:
    native = cpu.extension()
    pool, linear = native.Pool(1), cpu.packed_linear(torch.randn(5, 7), None)
    x, y = torch.randn(3, 7), torch.zeros(3, 5)
    good = (x.data_ptr(), 3, 7, 7), (y.data_ptr(), 3, 5, 5)
    native.norm_linear(None, pool, linear, *good, 1e-6)()
    for bad, message in {
        ((0, 3, 7, 7), good[1]): "null",
        ((x.data_ptr(), 3, 7, 6), good[1]): "pitch",
        ((x.data_ptr(), 3, 6, 7), good[1]): "wide",
        (good[0], (y.data_ptr(), 2, 5, 5)): "rows",
        (good[0], (y.data_ptr(), 3, 4, 5)): "wide",
        ((x.data_ptr(), -3, 7, 7), good[1]): "at least one row",
    }.items():
        with pytest.raises(ValueError, match=message):
            native.norm_linear(None, pool, linear, *bad, 1e-6)
    with pytest.raises(ValueError, match="threads"):
        native.Pool(0)
    with pytest.raises(ValueError, match="below 4"):
        native.norm_linear(
            None, pool, cpu.packed_linear(torch.randn(5, 2), None, reads=[0, 6]), (x.data_ptr(), 3, 4, 7), good[1], 1e-6
        )


def test_heads_and_linears_that_do_not_fit_are_refused() -> None:
    native = cpu.extension()
    pool, norms = native.Pool(1), native.Norms([], [])
    qkv, out = (torch.zeros(1, 4, 6), torch.zeros(1, 4, 2))
    tokens = (qkv.data_ptr(), 1, 4, 6, 24, 6), (out.data_ptr(), 1, 4, 2, 8, 2)
    most = 2**31 - 1
    for head in ((2, 2, most, 2, 4, 0), (2, 2, 0, 2, 4, most), (2, 2, 0, 2, 5, 0)):
        with pytest.raises(ValueError, match="head columns inside their rows"):
            native.ragged_attention(None, pool, [head], *tokens)
    partial = cpu.packed_linear(torch.randn(2, 6), None, writes=[0, 9])
    with pytest.raises(ValueError, match="a linear without reads and writes"):
        native.pool_head(
            None, pool, partial, norms, tokens[0], (out.data_ptr(), 1, 2, 2), native.Pooling.token, 1, 1e-6
        )
    fc1 = cpu.packed_linear(torch.randn(64, 6), None)
    assert fc1.column_blocks(64)[-1] == 64
    with pytest.raises(ValueError, match="at least one column"):
        fc1.column_blocks(0)
    weight = torch.randn(6, 64)
    for cut in (1, 63):
        fc2 = cpu.packed_linear(weight, None, k_start=[0, cut, 64])
        with pytest.raises(ValueError, match="blocks of fc2 of whole panels of fc1"):
            native.fused_mlp(None, pool, fc1, fc2, (qkv.data_ptr(), 4, 6, 6), native.Activation.gelu, 1e-6)


def test_a_missing_extension_is_an_error_with_the_command_that_builds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prunevit_kernels._cpu", None)
    with pytest.raises(MissingExtension, match=r"setup\.py build_ext --inplace"):
        NormLinear(3, torch.ones(2, 3), None, 1e-6).pack(Target("cpu"))


@pytest.mark.parametrize("isa", ["avx1024", "baseline "])
def test_an_unknown_instruction_set_is_a_named_error(isa: str) -> None:
    code = "from prunevit_kernels import _cpu; _cpu.isa()"
    env = {**os.environ, "PRUNEVIT_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "IsaError: expected PRUNEVIT_CPU_ISA to be one of" in done.stderr
    assert f"got {isa}" in done.stderr


def test_the_probes_measure_something() -> None:
    native = cpu.extension()
    assert native.fma_peak(1, 5) > 1e8
    assert native.bandwidth(1, 1 << 20, 5) > 1e7
    for threads, milliseconds in ((0, 5), (1, 0)):
        with pytest.raises(ValueError, match="at least one thread"):
            native.fma_peak(threads, milliseconds)
    with pytest.raises(ValueError, match="at least one thread"):
        native.bandwidth(0, 1 << 20, 5)
