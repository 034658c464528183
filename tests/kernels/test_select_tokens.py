"""select_tokens: the reference against a sort by hand, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels import SelectTokens
from prunevit_kernels.select_tokens import kept_tokens, select_tokens
from tests.kernels.half_precision_cases import select_tokens as make
from tests.kernels.single_precision import CPU, cases, drawn, run, run_drawn

CASES = cases("select_tokens")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(st.integers(1, 60), st.integers(1, 4), st.integers(2, 90), st.booleans(), st.booleans(), st.data())
def test_cpu_on_drawn_shapes(e: int, b: int, n: int, fuse: bool, ties: bool, data: st.DataObject) -> None:
    prefix = data.draw(st.integers(0, min(3, n - 1)))
    run_drawn(make(e, b, n, data.draw(st.integers(1, n - prefix)), prefix, fuse, ties))


def test_the_reference_keeps_the_highest_in_order_and_ties_go_to_the_earlier() -> None:
    scores = torch.tensor([[0.0, 2, 5, 2, 9, 2]])
    assert kept_tokens(scores, keep=3, prefix=1).tolist() == [[0, 1, 2, 4]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_reference_fuses_tokens_that_hardly_anyone_attends_to(dtype: torch.dtype) -> None:
    scores = torch.tensor([[2.0, 1.0, 1e-9, 1e-9, 2e-9]])
    x = torch.tensor([9.0, 9, 1, 2, 3]).view(1, 5, 1).to(dtype)
    tokens, _ = select_tokens(x, scores, keep=1, prefix=1, fuse=True)
    assert tokens[0, -1].item() == pytest.approx(2.25, rel=1e-2)


def test_cpu_orders_nan_and_zeros_as_torch_does() -> None:
    scores = torch.tensor([[1.0, -0.0, torch.nan, 0.0, -torch.inf, 2.0, torch.inf]])
    x = torch.arange(7.0).view(1, 7, 1)
    for keep in range(1, 7):
        kept = torch.zeros(1, keep + 1, 1)
        SelectTokens(1, keep, 1).pack(CPU).bind(x, scores, kept, torch.zeros(1, keep + 1))()
        assert kept[0, :, 0].long().tolist() == kept_tokens(scores, keep, 1)[0].tolist()
