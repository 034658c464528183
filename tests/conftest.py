"""One thread for torch in every test: tiny models on two busy threads ran five times slower. And an end to a process
whose GPU answers no more."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """After an illegal access every call fails: the next tests belong to a new process, if pytest-xdist makes one."""
    if report.failed and "gpu" in report.keywords and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"{report.longreprtext}\n{report.nodeid} left the GPU unusable: {error}", flush=True)
            os._exit(1)
