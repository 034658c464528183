"""fused_mlp: the reference against timm's block, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels import Activation
from prunevit_kernels.fused_mlp import fused_mlp
from tests.kernels.half_precision_cases import fused_mlp as make
from tests.kernels.single_precision import cases, drawn, run, run_drawn

CASES = cases("fused_mlp")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(
    st.integers(2, 90),
    st.integers(1, 600),
    st.integers(1, 3),
    st.integers(1, 70),
    st.sampled_from(["gelu", "gelu_tanh", "quick_gelu", "relu"]),
    st.booleans(),
    st.integers(1, 3),
)
def test_cpu_on_drawn_shapes(e: int, f: int, b: int, n: int, act: Activation, sparse: bool, threads: int) -> None:
    run_drawn(make(e, f, b, n, act, sparse), threads)


def test_the_reference_is_a_timm_mlp_around_a_norm() -> None:
    from timm.layers import LayerScale, Mlp

    mlp, scale = Mlp(6, 11).double(), LayerScale(6, 0.3).double()
    x = torch.randn(2, 3, 6).double() + 3
    want = x + scale(mlp(torch.nn.functional.layer_norm(x, (6,), eps=1e-6)))
    weights = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(fused_mlp(x, *weights, "gelu", 1e-6, scale.gamma), want)
