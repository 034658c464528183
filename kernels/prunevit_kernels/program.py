"""Several bound launches as one."""

from __future__ import annotations

from collections.abc import Sequence

from .target import Launch, Target


def fuse(launches: Sequence[Launch], target: Target) -> Launch:
    """One launch that runs all of them in order.

    Here a loop. A backend whose launches are native objects runs them in one call, without coming back to Python.
    """
    steps = tuple(launches)

    def run() -> None:
        for step in steps:
            step()

    return run
