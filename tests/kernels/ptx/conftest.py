"""The extension for the machine, linked once a session."""

from __future__ import annotations

import pytest

import setup_cuda

from .extension import EmulatedExtension


@pytest.fixture(scope="session")
def extension(tmp_path_factory: pytest.TempPathFactory) -> EmulatedExtension:
    if setup_cuda.find_nvcc() is None:
        pytest.skip("no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda: there is no PTX to run")
    return EmulatedExtension(tmp_path_factory.mktemp("extension"))
