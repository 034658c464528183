"""``-p tests.stand_in.plugin``: what pytest checks after each test on the stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .start import GPU


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Work that nobody waited for is done before the next test; if it fails, this one does."""
    yield
    torch.cuda.synchronize()
    GPU.raise_for(0)
