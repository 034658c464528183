"""A tiny checkpoint of digits, and a way to call the command line as a user does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from prunevit import api, from_timm
from prunevit.cli import app
from prunevit.data import DIGITS_CFG


@dataclass(frozen=True)
class Answer:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """All of stdout: anything beside the object would be an error here."""
        loaded: dict[str, Any] = json.loads(self.stdout)
        return loaded


Call = Callable[..., Answer]


def refused(answer: Answer, message: str) -> None:
    """With exit code 1 and one message that matches, not a traceback."""
    assert answer.code == 1
    assert answer.stderr.startswith("error: ") or "\nerror: " in answer.stderr
    assert re.search(message, answer.stderr)
    assert "Traceback" not in answer.stderr


@pytest.fixture
def call() -> Call:
    """``call("info", path, "--json")`` in this process. An exception that no command names is raised."""

    def run(*arguments: object) -> Answer:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], terminal_width=200)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Answer(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense ViT for the built-in digits: two blocks, two heads, random weights."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=2, num_heads=2)
    model.pretrained_cfg = dict(DIGITS_CFG)
    return api.save(from_timm(model), tmp_path_factory.mktemp("cli") / "tiny")
