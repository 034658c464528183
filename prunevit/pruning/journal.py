"""The journal of a search: one JSON line a probe, written as it is made, so that an interrupted search goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, expect


@dataclass(frozen=True)
class Probe:
    """One model that a search looked at: the ratio of ``part`` that was asked for, the share of the given model's units
    of that part that is ``gone`` in it, and what it is worth.
    """

    round: int
    part: str  # "mhsa" or "ffn"; "start" for the model that a round starts from
    ratio: float
    gone: float
    accuracy: float
    cost: float  # of the first constraint, as a share of the dense model's
    plan: str  # a hash of it: which model this was
    committed: bool = False


def journal_of(path: str | os.PathLike[str], *, attempt: int = 1, search: int = 1) -> str:
    """Where an attempt at a latency, and in it one of several searches, is written: none continues another's.

    Two attempts go by two corrections of the table of latencies.
    """
    ends = (f".{attempt}" * (attempt > 1), f".search{search}" * (search > 1))
    return os.fspath(path) + "".join(ends)


class Journal:
    """Probes by what was asked; in a file where a path is given.

    Raises :class:`CheckpointError` on the file of another search.
    """

    def __init__(self, path: str | os.PathLike[str] | None, search: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.probes: list[Probe] = []
        if self.path is None:
            return
        if self.path.exists():
            header, self.probes = read_journal(self.path)
            for name in search:
                given, found = search[name], header.get(name)
                what = f"{self.path} to be of this search, its {name} {given} (or name another file)"
                expect(found == given, CheckpointError, what, got=found)
            # a line that a crash cut short goes; nothing that was paid for is written again
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(_line(search), "utf-8")

    def find(self, round_: int, part: str, ratio: float, plan: str) -> Probe | None:
        asked = (round_, part, ratio)
        found = next((p for p in self.probes if (p.round, p.part, p.ratio) == asked and not p.committed), None)
        if found is not None and found.plan != plan:
            raise CheckpointError(
                f"expected {self.path} to be of this search, or the name of another file, got another plan of {part} "
                f"in round {round_} (other calibration images, or another scorer of that name)"
            )
        return found

    def add(self, probe: Probe) -> None:
        if probe in self.probes:
            return
        self.probes.append(probe)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(asdict(probe)))
                file.flush()
                os.fsync(file.fileno())


def read_journal(path: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Probe]]:
    """What a search was, and its probes; a last line that was cut short is left out."""
    lines = Path(path).read_text("utf-8").split("\n")
    complete = lines[:-1]  # every written line ends; what follows the last end was cut short
    try:
        header = json.loads(complete[0])
        probes = [Probe(**json.loads(line)) for line in complete[1:]]
    except (IndexError, ValueError, TypeError):
        raise CheckpointError(
            f"{path}: expected the journal of a search, or a name that no file has yet, got another file"
        ) from None
    return header, probes


def plot_journal(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """A picture of a search: accuracy over cost of every probe, and the committed way through them."""
    from matplotlib.figure import Figure

    header, probes = read_journal(path)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for part, marker in (("mhsa", "o"), ("ffn", "s")):
        tried = [probe for probe in probes if probe.part == part and not probe.committed]
        axes.scatter(
            [100 * p.cost for p in tried], [100 * p.accuracy for p in tried], marker=marker, alpha=0.4, label=part
        )
    way = [probe for probe in probes if probe.committed or (probe.part == "start" and probe.round == 0)]
    axes.plot([100 * p.cost for p in way], [100 * p.accuracy for p in way], color="black", label="committed")
    for probe in way[1:]:
        axes.annotate(f"{probe.part} {probe.gone:.0%}", (100 * probe.cost, 100 * probe.accuracy), fontsize=7)
    axes.invert_xaxis()
    axes.set_xlabel(f"{header.get('cost', 'cost')}, % of dense")
    axes.set_ylabel("held-out accuracy, %")
    axes.legend()
    figure.savefig(out, dpi=150)


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(dict(data), sort_keys=True) + "\n"
