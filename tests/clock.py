"""A clock that counts, for tests of what is done with a latency and not of how it is measured."""

from __future__ import annotations

import pytest

from prunevit.latency import Measured


def count_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's milliseconds are its millions of multiply-accumulates, by the table and on the whole alike."""
    monkeypatch.setattr(Measured, "__call__", lambda self, spec: spec.macs() / 1e6)
    monkeypatch.setattr(Measured, "aim", lambda self, most: None)
    monkeypatch.setattr(Measured, "_anchor", lambda self, spec, measure: spec.macs() / 1e6)
    monkeypatch.setattr(Measured, "_time", lambda self, runtimes: [r.spec.macs() / 1e6 for r in runtimes])
