"""tuning.json: the tiles that were found fastest, per GPU and version. Written offline, read at pack time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ._configs import Tile, as_json
from ._expect import ContractError, expect

FORMAT = 1
LIMITS = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 64), "warps": (1, 16), "stages": (1, 8)}


@dataclass(frozen=True, eq=False)
class Tuning:
    """Tiles by problem, for the machine named by ``machine``; ``others`` are those that its file has beside it."""

    machine: str
    tiles: Mapping[str, Tile]
    others: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path, machine: str) -> Tuning:
        """The part of a tuning file that was measured on ``machine``: empty where there is none."""
        machines = _machines(path)
        tiles = machines.get(machine, {})
        expect(isinstance(tiles, dict), f"a table of tiles in {path}", got=type(tiles).__name__)
        others = tuple(sorted(name for name in machines if name != machine))
        return cls(machine, {key: _tile(key, value) for key, value in tiles.items()}, others)

    def write(self, path: Path) -> None:
        """Add this machine's tiles to a file; what other machines found stays."""
        machines = _machines(path) if path.exists() else {}
        machines[self.machine] = {key: as_json(tile) for key, tile in sorted(self.tiles.items())}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n", "utf-8")
        temporary.replace(path)


def machine_name(device: torch.device | None = None) -> str:
    """A GPU and the versions that decide what a kernel compiles to."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, cuda {torch.version.cuda}"


def _machines(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ContractError(f"expected JSON in {path}, got: {error}") from error
    expect(isinstance(document, dict) and document.get("format") == FORMAT, f"format {FORMAT}", got=path)
    machines: dict[str, Any] = document.get("machines", {})
    expect(isinstance(machines, dict), f"a table of machines in {path}", got=type(machines).__name__)
    return machines


def _tile(key: str, value: object) -> Tile:
    """A file is untrusted: sizes that no kernel here has are refused, not compiled."""
    names = {field.name for field in fields(Tile)}
    expect(isinstance(value, dict) and set(value) == names, f"a tile for {key!r}", got=value, want=sorted(names))
    assert isinstance(value, dict)
    for name, (low, high) in LIMITS.items():
        size = value[name]
        power = type(size) is int and low <= size <= high and (name == "stages" or size & (size - 1) == 0)
        expect(power, f"{name} of {key!r} a power of two from {low} to {high}", got=size)
    return Tile(**value)
