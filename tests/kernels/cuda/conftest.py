"""Programs compiled once a session: the emulator and the layout's checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.cuda.emulation import build


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("emulate", tmp_path_factory.mktemp("emulator"))
