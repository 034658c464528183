"""The scorers by name."""

from __future__ import annotations

from .gohsp import GOHSP
from .magnitude import Magnitude
from .method import Scorer
from .random import Random
from .snp import SNP
from .taylor import Taylor

SCORERS: dict[str, type[Scorer]] = {
    "gohsp": GOHSP,
    "magnitude": Magnitude,
    "random": Random,
    "snp": SNP,
    "taylor": Taylor,
}
