"""What a model's ``provenance`` says of how it was pruned: one entry for each call of prune(), in order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..spec import ViTSpec

# where a search is written to and who watches it: not what was asked for
_BESIDE = ("journal", "on_probe")
# what was measured of the model that is pruned, and holds no longer
_MEASURED = ("accuracy", "latency")


def with_pruning(provenance: Mapping[str, Any], names: Sequence[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A model's provenance after one more call of prune() by the methods ``names``; ``asked`` are its arguments.

    ``method`` joins the names of all calls, ``prunings`` has the arguments of each. Older checkpoints have the
    constraints and the seed of their last call beside ``method``: all that is known of them, and the first entry here.
    """
    made = {name: value for name, value in provenance.items() if name not in _MEASURED}
    before = {name: made.pop(name) for name in ("method", "constraints", "seed") if name in made}
    entries = made.pop("prunings", None)
    if not isinstance(entries, list):  # a checkpoint may hold anything there
        entries = [before] if before else []
    entry = {name: _plain(value) for name, value in asked.items() if value is not None and name not in _BESIDE}
    earlier = [str(before["method"])] if "method" in before else []
    return {**made, "method": "+".join([*earlier, *names]), "prunings": [*entries, entry]}


def _plain(value: Any) -> Any:
    """As config.json can hold it. Of a shape its type: its widths are those of the model that came out."""

    def shown(other: Any) -> Any:
        if isinstance(other, Mapping):
            return dict(other)
        return type(other).__name__ if isinstance(other, ViTSpec) else repr(other)

    try:
        return json.loads(json.dumps(value, allow_nan=False, default=shown))
    except (TypeError, ValueError):
        return repr(value)
