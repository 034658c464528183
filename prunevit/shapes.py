"""Published ragged shapes by name, for tests, benchmarks and comparisons.

``shapes.json`` beside this file holds, for each, its source and its widths; the dense originals stand under timm's
names. ``prunevit.shapes.get("snp_deit_small")`` is a :class:`ViTSpec` at 224 px, patch 16, 1000 classes.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

from .errors import SpecError
from .spec import ViTSpec


@cache
def _entries() -> dict[str, dict[str, Any]]:
    entries: dict[str, dict[str, Any]] = json.loads(files(__package__).joinpath("shapes.json").read_text("utf-8"))
    return entries


def names(*, dense: bool = False) -> list[str]:
    """The pruned shapes, or with ``dense`` their dense originals."""
    return [name for name, entry in _entries().items() if ("dense" not in entry) == dense]


def entry(name: str) -> dict[str, Any]:
    """The published facts: source, widths, and ``gmac`` where one was published."""
    if name not in _entries():
        raise SpecError(f"no shape {name!r}; there are {', '.join(_entries())}")
    return dict(_entries()[name])


def get(name: str, **fields: Any) -> ViTSpec:
    """A named shape as a spec; ``fields`` override the spec's own, such as ``num_classes`` or ``img_size``."""
    return ViTSpec.from_shape(entry(name), **fields)


def dense_of(name: str) -> str:
    """The name of the dense model that a shape was pruned from, or is nearest to."""
    original: str = entry(name)["dense"]
    return original
