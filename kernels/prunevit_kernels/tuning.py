"""tuning.json: what was found fastest, per GPU and version. Written offline, read when ops are packed and bound.

A machine's table has a tile for each problem of a Triton kernel, and the name of a kernel for each fused_mlp.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from ._configs import MLP_KERNELS, Problem, Tile
from ._expect import ContractError, expect
from .units import dtype_name

FORMAT = 1
LIMITS = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 64), "warps": (1, 16), "stages": (1, 8)}


@dataclass(frozen=True, eq=False)
class Tuning:
    """Tiles, and kernels of fused_mlp, by problem, for the machine named by ``machine``.

    ``others`` are the machines that its file has beside it.
    """

    machine: str
    tiles: Mapping[str, Tile] = field(default_factory=dict)
    kernels: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.tiles) + len(self.kernels)

    def kernel_for(self, problem: Problem, dtype: torch.dtype) -> str | None:
        """What runs this fused_mlp fastest here, where it was measured."""
        return self.kernels.get(problem.key(dtype_name(dtype)))

    def joined(self, later: Tuning) -> Tuning:
        """This table with what a later one of the same machine found."""
        return Tuning(self.machine, {**self.tiles, **later.tiles}, {**self.kernels, **later.kernels}, self.others)

    @classmethod
    def read(cls, path: Path, machine: str) -> Tuning:
        """The part of a tuning file that was measured on ``machine``: empty where there is none."""
        machines = _machines(path)
        table = machines.get(machine, {})
        expect(isinstance(table, dict), f"a table of tiles in {path}", got=type(table).__name__)
        others = tuple(sorted(name for name in machines if name != machine))
        kernels = {key: _kernel(key, value) for key, value in table.items() if key.startswith("fused_mlp ")}
        tiles = {key: _tile(key, value) for key, value in table.items() if key not in kernels}
        return cls(machine, tiles, kernels, others)

    def write(self, path: Path) -> None:
        """Make this the machine's table in a file; what other machines found stays."""
        machines = _machines(path) if path.exists() else {}
        tiles = {key: asdict(tile) for key, tile in sorted(self.tiles.items())}
        machines[self.machine] = tiles | {key: {"kernel": name} for key, name in sorted(self.kernels.items())}
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


def _kernel(key: str, value: object) -> str:
    named = isinstance(value, dict) and set(value) == {"kernel"} and value["kernel"] in MLP_KERNELS
    expect(named, f"a kernel for {key!r}", got=value, want=[{"kernel": name} for name in MLP_KERNELS])
    assert isinstance(value, dict)
    return str(value["kernel"])


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
