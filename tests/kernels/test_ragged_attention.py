"""ragged_attention: the reference against torch's own attention, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from prunevit_kernels import ContractError, HeadTable, RaggedAttention, Target
from prunevit_kernels.ragged_attention import ragged_attention
from prunevit_kernels.target import HALF
from tests.kernels.half_precision import attention_case as make
from tests.kernels.single_precision import CPU, cases, drawn, run, run_drawn

CASES = cases("ragged_attention")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(
    st.lists(st.tuples(st.integers(1, 128), st.integers(1, 128)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 300),
    st.data(),
)
def test_cpu_on_drawn_shapes(dims: list[tuple[int, int]], b: int, n: int, data: st.DataObject) -> None:
    queries = data.draw(st.integers(1, n))
    run_drawn(make([qk for qk, _ in dims], [v for _, v in dims], b, n, queries), data.draw(st.integers(1, 3)))


def test_buffers_on_another_gpu_than_the_weights_are_refused() -> None:
    op, target = RaggedAttention(HeadTable.packed([8], [8], align=8)), Target("cuda", torch.device("cuda", 1), HALF[0])
    with FakeTensorMode():
        there, elsewhere = (
            (torch.empty(1, 5, 24, device=gpu, dtype=HALF[0]), torch.empty(1, 5, 8, device=gpu, dtype=HALF[0]))
            for gpu in ("cuda:1", "cuda:0")
        )
        op.check(target, *there)
        with pytest.raises(ContractError, match=r"expected qkv on device \(cuda:1\), got cuda:0"):
            op.check(target, *elsewhere)


def test_the_reference_is_scaled_dot_product_attention() -> None:
    heads = HeadTable.packed([3, 8], [5, 2], align=4)
    qkv = torch.randn(2, 7, heads.width).double() + 1
    got = ragged_attention(qkv, heads)
    for h in range(2):
        at = ((heads.q[h], heads.qk_dims[h]), (heads.k[h], heads.qk_dims[h]), (heads.v[h], heads.v_dims[h]))
        q, k, v = (qkv[..., start : start + width] for start, width in at)
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=math.log(2))
        torch.testing.assert_close(got[..., heads.o[h] : heads.o[h] + heads.v_dims[h]], want)
    assert (got[..., 5:8] == 0).all()


@pytest.mark.parametrize("shift", [-3000.0, -90.0, 0.0, 90.0, 3000.0])
def test_cpu_with_scores_of_any_size(shift: float) -> None:
    """Softmax does not change with a shift of all scores, which the kernel's short way does not survive."""
    heads = HeadTable.packed([3], [4])
    qkv = torch.randn(1, 300, heads.width)
    qkv[..., 0], qkv[..., 3] = 1.0, shift  # adds `shift` to every score
    out = torch.full((1, 300, 4), math.nan)
    RaggedAttention(heads).pack(CPU).bind(qkv, out)()
    want = ragged_attention(qkv.double(), heads)
    assert (out.double() - want).abs().max() <= 1e-6 * max(1, abs(shift))


def test_cpu_with_infinite_and_nan_scores_does_as_eager_does() -> None:
    heads = HeadTable.packed([1], [1])
    qkv = torch.tensor([[[1.0, 2.0, 5.0], [1.0, -math.inf, 7.0], [math.nan, 1.0, 1.0]]])
    out = torch.zeros(1, 3, 1)
    RaggedAttention(heads).pack(CPU).bind(qkv, out)()
    torch.testing.assert_close(out, ragged_attention(qkv, heads), equal_nan=True)


def test_cpu_with_weights_that_underflow_is_not_slowed_by_denormals_nor_wrong() -> None:
    heads = HeadTable.packed([1], [1])
    qkv = torch.ones(1, 40, 3)
    qkv[..., 1] = -torch.arange(40) * 4.0  # weights from 1 to 2^-156
    out = torch.zeros(1, 40, 1)
    RaggedAttention(heads).pack(CPU).bind(qkv, out)()
    torch.testing.assert_close(out, torch.ones_like(out))
