"""linear_residual: the reference against its formula, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels.linear_residual import linear_residual
from tests.kernels.half_precision_cases import linear_residual as make
from tests.kernels.single_precision import cases, drawn, run, run_drawn

CASES = cases("linear_residual")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(st.integers(1, 90), st.integers(1, 140), st.integers(1, 3), st.integers(1, 90), st.booleans(), st.data())
def test_cpu_on_drawn_shapes(e: int, k: int, b: int, n: int, gamma: bool, data: st.DataObject) -> None:
    writes = data.draw(st.none() | st.lists(st.integers(0, e - 1), min_size=1, unique=True))
    run_drawn(make(e, k, b, n, gamma, writes), data.draw(st.integers(1, 3)))


def test_the_reference_adds_to_the_written_channels_only() -> None:
    x, c = torch.randn(4, 6).double(), torch.randn(4, 3).double()
    weight, bias, gamma = torch.randn(2, 3).double(), torch.randn(2).double(), torch.randn(2).double()
    want = x.clone()
    for i, channel in enumerate((5, 1)):
        want[:, channel] += gamma[i] * (c @ weight[i] + bias[i])
    torch.testing.assert_close(linear_residual(x, c, weight, bias, gamma, (5, 1)), want)
