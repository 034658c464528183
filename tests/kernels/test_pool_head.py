"""pool_head: the reference against its parts, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels import ContractError, Pool, PoolHead, Target
from prunevit_kernels.pool_head import pool_head
from tests.kernels.half_precision_cases import pool_head as make
from tests.kernels.single_precision import CPU, cases, drawn, run, run_drawn

CASES = cases("pool_head")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(
    st.integers(2, 90),
    st.none() | st.integers(1, 140),
    st.sampled_from(["token", "tokens", "avg", "max", "avgmax", "none"]),
    st.integers(1, 4),
    st.integers(2, 40),
    st.booleans(),
    st.booleans(),
)
def test_cpu_on_drawn_shapes(e: int, classes: int | None, pool: Pool, b: int, n: int, norm: bool, after: bool) -> None:
    run_drawn(make(e, classes, pool, b, n, norm, after and pool != "tokens"))


def test_more_rows_than_an_int_has_products_of() -> None:
    run(make(3, 5, "none", 1, 200_000, norm=False))


def test_the_reference_leaves_prefix_tokens_out_of_a_mean() -> None:
    x, weight = torch.randn(2, 5, 3).double(), torch.randn(4, 3).double()
    torch.testing.assert_close(pool_head(x, "avg", 2, 1e-6, weight=weight), x[:, 2:].mean(1) @ weight.T)


@pytest.mark.parametrize("target", [CPU, Target("torch")], ids=["cpu", "torch"])
@pytest.mark.parametrize(
    ("pool", "prefix", "n", "width", "refusal"),
    [("avg", 5, 5, 3, "at least one token to pool"), ("tokens", 0, 1, 6, "two tokens to pool")],
)
def test_pooling_too_few_tokens_is_refused(
    target: Target, pool: Pool, prefix: int, n: int, width: int, refusal: str
) -> None:
    packed = PoolHead(3, pool, prefix, 1e-6).pack(target)
    with pytest.raises(ContractError, match=refusal):
        packed.bind(torch.randn(2, n, 3), torch.zeros(2, width))
