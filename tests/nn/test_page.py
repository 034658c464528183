"""The code on the page about accelerate runs, top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/how-to/accelerate.md"


@pytest.mark.filterwarnings("ignore:.*gradients are on:RuntimeWarning")
def test_the_page_runs() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
    assert names["logits"].shape == (2, 1000)
    assert names["block"].norm1.weight.grad is not None
