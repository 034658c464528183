"""Tests that run kernels in Triton's interpreter, which must be switched on before Triton is imported."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]  # tests/kernels/triton/test_interpreter.py runs them in their own process
