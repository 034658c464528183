"""docs/environment.md lists every variable that is read, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# what reads an environment: getenv("…"), environ["…"] and environ.get("…"), or a name kept beside them
READ = re.compile(r'(?:getenv\(|environ(?:\.get\(|\[)|_VARIABLE = )"(PRUNEVIT_[A-Z_]+)"')


def test_every_variable_is_listed() -> None:
    folders = [ROOT / name for name in ("prunevit", "kernels", "csrc", "bench", "examples")]
    sources = [
        path
        for folder in folders
        for path in folder.rglob("*.*")
        if path.suffix in (".py", ".cpp", ".cu", ".h", ".cuh")
    ]
    sources += ROOT.glob("*.py")
    read = {name for path in sources for name in READ.findall(path.read_text("utf-8"))}
    page = (ROOT / "docs/environment.md").read_text("utf-8")
    assert read == set(re.findall(r"^\| `(PRUNEVIT_[A-Z_]+)` \|", page, re.MULTILINE))
