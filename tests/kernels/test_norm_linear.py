"""norm_linear: the reference against its two steps, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels import ContractError, NormLinear
from prunevit_kernels.norm_linear import norm_linear
from tests.kernels.half_precision_cases import norm_linear as make
from tests.kernels.single_precision import CPU, cases, drawn, run, run_drawn

CASES = cases("norm_linear")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(st.integers(1, 90), st.integers(1, 140), st.integers(1, 3), st.integers(1, 90), st.integers(1, 3), st.data())
def test_cpu_on_drawn_shapes(e: int, d: int, b: int, n: int, threads: int, data: st.DataObject) -> None:
    reads = data.draw(st.none() | st.lists(st.integers(0, e - 1), min_size=1, unique=True))
    run_drawn(make(e, d, b, n, reads), threads)


def test_the_reference_normalises_then_multiplies() -> None:
    x, weight, bias = torch.randn(4, 7).double() + 3, torch.randn(5, 3).double(), torch.randn(5).double()
    centred = x - x.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    got = norm_linear(x, weight, bias, 1e-6, reads=(6, 0, 2))
    torch.testing.assert_close(got, normed[:, [6, 0, 2]] @ weight.T + bias)


@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_rows_of_one_number_leave_the_bias(eps: float) -> None:
    x = torch.logspace(-3, 8, 400).view(1, -1, 1).repeat(1, 1, 307)
    y, bias = torch.full((1, 400, 5), torch.nan), torch.randn(5)
    NormLinear(307, torch.randn(5, 307) / 18, bias, eps).pack(CPU).bind(x, y)()
    assert y.isfinite().all()


def test_a_buffer_of_another_width_is_refused_before_anything_is_written() -> None:
    packed = NormLinear(7, torch.randn(5, 7), None, 1e-6).pack(CPU)
    y = torch.full((1, 3, 5), 9.0)
    with pytest.raises(ContractError, match=r"x of shape .*got \(1, 3, 8\)"):
        packed.bind(torch.randn(1, 3, 8), y)
    assert (y == 9).all()
