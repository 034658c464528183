"""token_scores: the reference against attention maps, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels import ContractError, HeadTable, Rule, TokenScores
from prunevit_kernels.token_scores import token_scores
from tests.kernels.half_precision import scores_case as make
from tests.kernels.single_precision import CPU, cases, drawn, run, run_drawn

CASES = cases("token_scores")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(
    st.lists(st.integers(1, 128), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 120),
    st.sampled_from(["max_attention", "class_attention"]),
    st.booleans(),
)
def test_cpu_on_drawn_shapes(qk: list[int], b: int, n: int, rule: Rule, add: bool) -> None:
    run_drawn(make(qk, b, n, rule, add))


def test_one_class_token_among_more_keys_than_an_int_has_products_of() -> None:
    heads, n = HeadTable.packed([3], [1]), 200_000
    qkv, scores = torch.randn(1, n, heads.width), torch.zeros(1, n)
    TokenScores(heads, "class_attention").pack(CPU).bind(qkv, scores)()
    wide = qkv.double()
    want = torch.exp2(wide[0, :, 3:6] @ wide[0, 0, :3])
    torch.testing.assert_close(scores[0].double(), want / want.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("query", [3, 39])
def test_a_query_that_is_not_a_number_makes_every_score_so(query: int) -> None:
    heads = HeadTable.packed([13], [1])
    qkv, scores = torch.randn(1, 40, heads.width), torch.zeros(1, 40)
    qkv[0, query, :13] = torch.nan
    TokenScores(heads, "max_attention").pack(CPU).bind(qkv, scores)()
    assert scores.isnan().all()


def test_no_heads_is_refused() -> None:
    with pytest.raises(ContractError, match="at least one head"):
        TokenScores(HeadTable.packed([], []), "max_attention")


def test_the_reference_reads_scores_off_the_attention_maps() -> None:
    heads = HeadTable.packed([2], [1])
    qkv = torch.tensor([[[0.0, 1, 9, 0, 0], [0, 2, 0, 1, 0], [5, 0, 0, 2, 0]]]).double()
    scores = qkv[0, :, :2] @ qkv[0, :, 2:4].T
    weights = torch.exp2(scores) / torch.exp2(scores).sum(1, keepdim=True)
    torch.testing.assert_close(token_scores(qkv, heads, "class_attention")[0], weights[0])
    torch.testing.assert_close(token_scores(qkv, heads, "max_attention")[0], weights.amax(0))
