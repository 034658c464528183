"""patch_embed: the reference against an unfolded product, and the C++ kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunevit_kernels.patch_embed import patch_embed
from tests.kernels.half_precision_cases import patch_embed as make
from tests.kernels.single_precision import cases, drawn, run, run_drawn

CASES = cases("patch_embed")


@pytest.mark.parametrize("name", CASES)
def test_cpu(name: str) -> None:
    run(CASES[name]())


@drawn
@given(
    st.integers(1, 60),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(9, 40), st.integers(9, 40)),
    st.integers(0, 3),
    st.integers(1, 3),
    st.tuples(st.booleans(), st.booleans()),
)
def test_cpu_on_drawn_shapes(
    e: int, patch: tuple[int, int], image: tuple[int, int], prefix: int, b: int, norms: tuple[bool, bool]
) -> None:
    run_drawn(make(max(e, 2), patch, image, prefix, b, norms))


def test_the_reference_multiplies_patches_and_leaves_the_rest_of_the_image() -> None:
    images = torch.randn(2, 3, 5, 9).double()
    weight, positions, prefix = torch.randn(4, 3, 2, 4).double(), torch.randn(4, 4).double(), torch.randn(1, 4).double()
    got = patch_embed(images, weight, None, positions, prefix, 1e-6)
    for i, (y, x) in enumerate([(0, 0), (0, 4), (2, 0), (2, 4)]):
        want = images[:, :, y : y + 2, x : x + 4].flatten(1) @ weight.flatten(1).T + positions[i]
        torch.testing.assert_close(got[:, 1 + i], want)
    torch.testing.assert_close(got[:, 0], prefix.expand(2, 4))
