"""``-p tests.stand_in.plugin``: what pytest does differently on the stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .start import GPU


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """The time that a test has on a GPU is too short here, unless another was asked for."""
    if config.option.timeout is None:
        config.option.timeout = 1800


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Work that nobody waited for is done before the next test; if it fails, this one does."""
    yield
    torch.cuda.synchronize()
    GPU.raise_for(0)
