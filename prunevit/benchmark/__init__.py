"""Whole models against what else runs them on this machine, interleaved, each in a process of its own."""

from .compare import Comparison, compare
from .interleaved import Peer, PeerFailed, best_of, run_interleaved, serve, speedup, timed
from .peers import MODEL_PEERS, missing

__all__ = [
    "MODEL_PEERS",
    "Comparison",
    "Peer",
    "PeerFailed",
    "best_of",
    "compare",
    "missing",
    "run_interleaved",
    "serve",
    "speedup",
    "timed",
]
