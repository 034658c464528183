"""One model at one batch size: prunevit, every peer that is installed, and the dense original in each of them."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunevit_kernels.target import available_cores, cpu_extension_built

from ..errors import InputError, expect
from ..interop.onnx import export_onnx
from ..models.files import WEIGHTS
from .interleaved import Peer, best_of, run_interleaved, speedup, speedups
from .peers import MODEL_PEERS, build_model, missing, spec_of

Job = dict[str, Any]
ONNX_PEERS = ("onnxruntime", "openvino")


@dataclass
class Comparison:
    """What was timed. ``ours`` and ``pruned`` run the same model, ``denses`` what it was pruned from."""

    ours: Peer
    pruned: list[Peer]
    denses: list[Peer]
    peak: Peer | None
    batch: int
    threads: int

    @property
    def macs_ratio(self) -> float | None:
        """How many times fewer multiply-accumulates the pruned model has than the dense one."""
        if not self.denses:
            return None
        return spec_of(self.denses[0].job).macs() / spec_of(self.ours.job).macs()

    def peak_gflops(self) -> float | None:
        """The multiply-add peak, the median over rounds."""
        return None if self.peak is None else statistics.median(x for samples in self.peak.samples for x in samples)

    def rows(self) -> list[dict[str, Any]]:
        """A row a peer. ``gflops`` counts what it runs: prunevit leaves out the last block's rows that no one reads."""
        rows = []
        best, best_dense = best_of(self.pruned, self.ours), best_of(self.denses, self.ours)
        assert best is not None  # there is at least one peer
        for peer in [self.ours, *self.pruned, *self.denses]:
            dense = peer in self.denses
            macs = peer.facts.get("executed_macs", spec_of(peer.job).macs()) * self.batch
            ms, other = peer.quantile(0.5), best_dense if dense and best_dense is not None else best
            row: dict[str, Any] = {
                "impl": peer.name,
                "dense": dense,
                "batch": self.batch,
                "threads": self.threads,
                "ms_p50": ms,
                "ms_p20": peer.quantile(0.2),
                "ms_p80": peer.quantile(0.8),
                "img_per_s": 1e3 * self.batch / ms,
                "gflops": 2e-6 * macs / ms,
                "fraction_of_peak": self._share_of_peak(peer, macs),
                "ratio_to_best_peer": speedup(peer, other),
                "prunevit_over_it": speedup(self.ours, peer),
            }
            if peer is self.ours:
                among = speedups(self.ours, best)
                row |= {"best_peer": best.name, "ratio_lowest": min(among), "ratio_highest": max(among)}
                row |= {"fma_peak_gflops": self.peak_gflops()}
                if best_dense is not None:
                    row |= {
                        "best_dense_peer": best_dense.name,
                        "pruned_over_dense": speedup(self.ours, best_dense),
                        "macs_ratio": self.macs_ratio,
                    }
            rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        return rows

    def _share_of_peak(self, peer: Peer, macs: int) -> float | None:
        if self.peak is None:
            return None
        shares = [
            2e-6 * macs / statistics.median(ms) / statistics.median(gflops)
            for ms, gflops in zip(peer.samples, self.peak.samples, strict=True)
        ]
        return statistics.median(shares)


def compare(
    model: Job,
    dense: Job | None = None,
    *,
    batch: int = 1,
    threads: int | None = None,
    rounds: int = 9,
    seconds: float = 0.4,
    peers: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Comparison:
    """Time a model, named as a job of ``peers.py`` names it, and its dense original where there is one.

    ``threads``: as many as there are cores by default. ``peers``: some of :data:`MODEL_PEERS`; all that are installed
    by default. Raises :class:`InputError` for a peer that is unknown or not installed, :class:`PeerFailed` for one that
    ends early.
    """
    threads = available_cores() if threads is None else threads
    expect(threads >= 1, InputError, "at least one thread", got=threads)
    expect(batch >= 1, InputError, "a batch of at least one image", got=batch)
    expect(rounds >= 1, InputError, "at least one round", got=rounds)
    names = [name for name in MODEL_PEERS if missing(name) is None] if peers is None else list(peers)
    expect(len(names) > 0, InputError, f"at least one peer out of {', '.join(MODEL_PEERS)}", got="none")
    for name in names:
        expect(name in MODEL_PEERS, InputError, f"peers out of {', '.join(MODEL_PEERS)}", got=name)
        reason = missing(name)
        expect(reason is None, InputError, f"{name} to be installed", got=reason)
    models = [{**job, "batch": batch} for job in (model, dense) if job is not None]
    if set(names) & set(ONNX_PEERS):
        for job in models:
            progress("exporting to ONNX")
            job["onnx"] = str(onnx_file(job))
    ours = Peer("prunevit", models[0])
    peak = Peer("fma_peak", {}) if cpu_extension_built() else None
    pruned = [Peer(name, models[0]) for name in names]
    denses = [Peer(name, job) for job in models[1:] for name in names]
    everyone = [*([peak] if peak is not None else []), ours, *pruned, *denses]
    run_interleaved(everyone, threads=threads, rounds=rounds, seconds=seconds, progress=progress)
    return Comparison(ours, pruned, denses, peak, batch, threads)


def onnx_file(job: Job) -> Path:
    """The job's model as ONNX at its batch size. Kept from run to run: exporting takes longer than a benchmark."""
    digest = hashlib.sha256(json.dumps([spec_of(job).to_dict(), torch.__version__, job["batch"]]).encode())
    if "checkpoint" in job:
        digest.update((Path(job["checkpoint"]) / WEIGHTS).read_bytes())
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"prunevit-bench-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{digest.hexdigest()[:16]}.onnx"
    if not path.exists():
        export_onnx(build_model(job), path, batch=job["batch"], check=False)
    return path
