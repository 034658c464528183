"""Memory that all programs of an engine share: they take turns, so no two need it at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Need(NamedTuple):
    """How many elements of which dtype a buffer has."""

    size: int
    dtype: torch.dtype


class Arena:
    """Flat buffers by name, as large as the largest program so far wants them.

    What is bound holds addresses, so memory never moves: a larger program gets a new slab, which later ones share, and
    an old slab lives until the programs that were bound to it are gone. Prepare the largest batch first, and there is
    one slab.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._slab: dict[str, Tensor] = {}

    def take(self, needs: Mapping[str, Need]) -> dict[str, Tensor]:
        """The start of each named buffer, of the size that is needed."""
        if not all(self._has(name, need) for name, need in needs.items()):
            self._slab = {name: self._grown(name, need) for name, need in needs.items()}
        return {name: self._slab[name][: need.size] for name, need in needs.items()}

    def clear(self) -> None:
        """Keep nothing for later: memory then lives as long as the programs that use it."""
        self._slab = {}

    def _has(self, name: str, need: Need) -> bool:
        held = self._slab.get(name)
        return held is not None and held.dtype == need.dtype and held.numel() >= need.size

    def _grown(self, name: str, need: Need) -> Tensor:
        held = self._slab.get(name)
        size = max(need.size, 0 if held is None or held.dtype != need.dtype else held.numel())
        # zeros, so that what no one writes is defined; in inference mode, they could not be written outside it
        with torch.inference_mode(False):
            return torch.zeros(size, dtype=need.dtype, device=self.device)
