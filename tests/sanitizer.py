"""compute-sanitizer over some of the GPU's tests, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence


def finds_nothing(tool: str, kernels: Sequence[str], *tests: str) -> None:
    """Run ``tests`` (pytest's arguments) under a tool that looks at kernels with these words in their names alone."""
    sanitizer = shutil.which("compute-sanitizer")
    assert sanitizer is not None, "tests marked gpu need compute-sanitizer, which comes with the CUDA toolkit"
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    options += ["--report-api-errors", "no"]  # PyTorch asks drivers for more than they have
    if tool == "racecheck":
        # barriers of bulk copies lie in dynamic shared memory, where the compiler does not count them
        options += ["--racecheck-detect-level", "error", "--num-cuda-barriers", "64"]
    for kernel in kernels:
        options += ["--kernel-name", f"kernel_substring={kernel}"]
    # every tensor an allocation of its own: beside it lies nothing that may be touched
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, *options, sys.executable, "-m", "pytest", "-m", "gpu", "--timeout=0", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
