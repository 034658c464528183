"""Every other instruction set of this machine, each in a process of its own: it is chosen once a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunevit_kernels import cpu

HERE = Path(__file__).parent
OTHERS = [isa for isa in cpu.extension().isas() if isa != cpu.extension().isa()]


@pytest.mark.parametrize("isa", OTHERS)
def test_the_kernels_pass_their_tests_on(isa: str) -> None:
    files = [
        str(path) for path in sorted(HERE.glob("test_*.py")) if path.name not in (Path(__file__).name, "conftest.py")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu or within or infinities",
    ]
    done = subprocess.run(
        [*command, *files], env={**os.environ, "PRUNEVIT_CPU_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
