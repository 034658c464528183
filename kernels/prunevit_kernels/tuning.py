"""tuning.json: the tiles that were found fastest, per GPU and version. Written offline, read at pack time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ._configs import Tile, as_json
from ._expect import ContractError, expect

FORMAT = 1
LIMITS = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 64), "warps": (1, 16), "stages": (1, 8)}


@dataclass(frozen=True, eq=False)
class Tuning:
    """Tiles by problem, for the machine named by ``machine``."""

    machine: str
    tiles: Mapping[str, Tile]

    @classmethod
    def read(cls, path: Path, machine: str) -> Tuning:
        """The part of a tuning file that was measured on ``machine``: empty where there is none."""
        try:
            document = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ContractError(f"expected JSON in {path}, got: {error}") from error
        expect(isinstance(document, dict) and document.get("format") == FORMAT, f"format {FORMAT}", got=path)
        machines = document.get("machines", {})
        expect(isinstance(machines, dict), f"a table of machines in {path}", got=type(machines).__name__)
        return cls(machine, {key: _tile(key, value) for key, value in machines.get(machine, {}).items()})

    def write(self, path: Path) -> None:
        """Add this machine's tiles to a file; what other machines found stays."""
        empty: dict[str, Any] = {"format": FORMAT, "machines": {}}
        document = json.loads(path.read_text()) if path.exists() else empty
        document["machines"][self.machine] = {key: as_json(tile) for key, tile in sorted(self.tiles.items())}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        temporary.replace(path)


def machine_name() -> str:
    """The GPU and the versions that decide what a kernel compiles to."""
    import torch
    import triton

    return f"{torch.cuda.get_device_name()}, triton {triton.__version__}, cuda {torch.version.cuda}"


def _tile(key: str, value: object) -> Tile:
    """A file is untrusted: sizes that no kernel here has are refused, not compiled."""
    names = {field.name for field in fields(Tile)}
    expect(isinstance(value, dict) and set(value) == names, f"a tile for {key!r}", got=value, want=sorted(names))
    assert isinstance(value, dict)
    for name, (low, high) in LIMITS.items():
        size = value[name]
        power = isinstance(size, int) and low <= size <= high and (name == "stages" or size & (size - 1) == 0)
        expect(power, f"{name} of {key!r} a power of two from {low} to {high}", got=size)
    return Tile(**value)
