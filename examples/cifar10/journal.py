"""The journal of a grid: one JSON line a cell, written when the cell is done, so that an interrupted grid goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


class Journal:
    """Results by cell. The first line says what grid this is; a line that a crash cut short is dropped."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, dict(header)
        self.results: dict[str, dict[str, Any]] = {}
        if path.exists():
            lines = path.read_text("utf-8").split("\n")[:-1]
            found, *records = [json.loads(line) for line in lines]
            if found["setting"] != self.header["setting"]:
                changed = {k: (v, self.header["setting"].get(k)) for k, v in found["setting"].items()}
                changed = {k: v for k, v in changed.items() if v[0] != v[1]}
                raise SystemExit(f"{path}: expected the same setting, got {changed}; take another --out")
            self.header = found
            self.results = {key(record["cell"]): record for record in records}
            self._rewrite([found, *records])
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._rewrite([self.header])

    def __contains__(self, cell: Cell) -> bool:
        return key(cell) in self.results

    def facts(self, cell: Cell) -> dict[str, Any]:
        facts: dict[str, Any] = self.results[key(cell)]["facts"]
        return facts

    def add(self, cell: Cell, facts: Mapping[str, Any]) -> None:
        record = {"cell": cell, "facts": dict(facts)}
        self.results[key(cell)] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rewrite(self, records: list[dict[str, Any]]) -> None:
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
        os.replace(partial, self.path)


def key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)
