"""Several bound launches as one."""

from __future__ import annotations

from collections.abc import Sequence

from . import cpu
from .target import Launch, Target, in_order


def fuse(launches: Sequence[Launch], target: Target) -> Launch:
    """One launch that runs all of them in order.

    Native CPU launches run in one call, without coming back to Python in between; others are called in a loop.
    """
    if target.backend == "cpu" and launches:
        return cpu.program(launches)
    return in_order(tuple(launches))
