"""Runs the tests of interpreted/ where TRITON_INTERPRET=1: the variable changes what ``triton.jit`` makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_every_kernel_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "interpreted"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=folder.parents[3], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
