"""Time every saved model in prunevit's runtime: ``python examples/cifar10/latency.py --out DIR``.

All models live in one process and take turns: in every round each runs for a moment, so that a slow moment of the
machine hits all alike. What counts is the median over rounds of the ratio to the dense model within a round. Leave the
machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from run import environment
from tqdm import tqdm

import prunevit

BATCHES = (1, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where run.py put the models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.1, help="for each model and batch in a round")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = measure(options.out / "models", options.threads, options.rounds, options.seconds)
    record = {"environment": environment(), "rounds": options.rounds, "models": measured}
    (options.out / "latency.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    for name, found in measured.items():
        print(f"{name:40}", *(f"batch {b}: {m['ms']:.2f} ms, {m['speedup']:.2f} ×" for b, m in found.items()))


def measure(models: Path, threads: int, rounds: int, seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """By model and batch: the median time in ms, and how many times faster than dense."""
    names = sorted(path.name for path in models.iterdir() if (path / "config.json").exists())
    runtimes = {name: prunevit.Runtime(models / name, device="cpu", threads=threads) for name in names}
    size = runtimes["dense"].spec.img_size
    images = {batch: torch.randn(batch, 3, *size) for batch in BATCHES}
    calls = {(name, batch): partial(r, x) for name, r in runtimes.items() for batch, x in images.items()}
    samples: dict[tuple[str, int], list[float]] = {call: [] for call in calls}
    for call in calls.values():
        call()
    for _ in tqdm(range(rounds), "rounds"):
        for which, call in calls.items():
            samples[which].append(1e3 * median_time(call, seconds))
    return {
        name: {str(batch): _summary(samples[name, batch], samples["dense", batch]) for batch in BATCHES}
        for name in names
    }


def median_time(call: Callable[[], object], seconds: float) -> float:
    taken, end = list[float](), time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _summary(samples: list[float], dense: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(samples), "speedup": statistics.median(b / a for a, b in zip(samples, dense))}


if __name__ == "__main__":
    main()
