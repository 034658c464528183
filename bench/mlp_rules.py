"""The rows of kRules (csrc/cuda/plan.h) that measured times of fused_mlp imply.

    python bench/mlp_rules.py bench/results/fused_mlp-nvidia-h100-80gb-hbm3.json

Rows go by tiles of 64 rows an SM, then E, then F / E: what has been measured is cut half-way between two neighbours.
Within a run of F a kernel may be slower than the best by ``--tie``, so that noise does not write a row of its own.
What the rows then cost against the best kernel of each problem is printed below them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _works import TOKENS

from prunevit_kernels._configs import CUDA_MLP_KERNELS

ANY = math.inf


@dataclass(frozen=True)
class Point:
    """A problem and the µs of each kernel of the CUDA extension that takes it; ``triton``: of the Triton pair."""

    rows: int
    embed: int
    hidden: int
    times: dict[str, float]
    triton: float = ANY

    @property
    def ratio(self) -> float:
        return self.hidden / self.embed

    def loss(self, kernel: str) -> float:
        """How many times longer than the best one a kernel takes."""
        return self.times.get(kernel, ANY) / min(self.times.values())


@dataclass(frozen=True)
class Rule:
    """A row of kRules, without the GPU that it is for."""

    max_waves: float
    max_embed: float
    max_ratio: float
    kernel: str

    def line(self, sm: int) -> str:
        waves, ratio = (f"{limit:.3g}f" if limit < ANY else "kAny" for limit in (self.max_waves, self.max_ratio))
        waves, ratio = (text if "." in text or text == "kAny" else text.replace("f", ".0f") for text in (waves, ratio))
        return f"    {{{sm}, {sm}, {waves}, {self.max_embed:.0f}, {ratio}, Kernel::{self.kernel}}},"


def points_of(rows: Sequence[dict[str, Any]]) -> list[Point]:
    """The problems of a results file; one that several shapes have counts once, with the least times."""
    found = defaultdict[tuple[int, int, int], dict[str, float]](dict)
    for row in rows:
        if row["op"] == "fused_mlp" and row["impl"].startswith("prunevit:"):
            times = found[row["batch"] * TOKENS, row["e"], row["f"]]
            times[row["kernel"]] = min(row["us_p50"], times.get(row["kernel"], ANY))
    known = [(key, times) for key, times in sorted(found.items()) if set(times) & set(CUDA_MLP_KERNELS)]
    return [
        Point(*key, {name: us for name, us in times.items() if name != "triton"}, times.get("triton", ANY))
        for key, times in known
    ]


def waves(rows: int, multiprocessors: int) -> float:
    return -(-rows // 64) / multiprocessors


def runs(points: Sequence[Point], tie: float) -> list[tuple[float, str]]:
    """(F / E up to, kernel) for problems of one M and one E: the longest runs that stay within the tie."""
    ordered, found = sorted(points, key=lambda point: point.ratio), list[tuple[float, str]]()
    at = 0
    while at < len(ordered):
        lengths = {}
        for kernel in ordered[at].times:
            slower = (i for i, point in enumerate(ordered[at:]) if point.loss(kernel) > 1 + tie)
            lengths[kernel] = next(slower, len(ordered) - at)
        longest = max(lengths.values())
        kernel = min((name for name in lengths if lengths[name] == longest), key=ordered[at].times.__getitem__)
        at += longest
        last, following = ordered[at - 1].ratio, ordered[at].ratio if at < len(ordered) else ANY
        found.append((math.sqrt(last * following), kernel))
    return found


def rules_of(points: Sequence[Point], multiprocessors: int, tie: float = 0.03) -> list[Rule]:
    """Rows that choose for every point a kernel within the tie; the first that fits counts."""
    found = list[Rule]()
    batches = sorted({point.rows for point in points})
    for rows, next_rows in zip(batches, [*batches[1:], None], strict=True):
        here = [point for point in points if point.rows == rows]
        embeds, of_batch = sorted({point.embed for point in here}), list[Rule]()
        most = ANY if next_rows is None else math.sqrt(
            waves(rows, multiprocessors) * waves(next_rows, multiprocessors)
        )  # fmt: skip
        for embed, next_embed in zip(embeds, [*embeds[1:], None], strict=True):
            widest = embed if next_embed is None else int(math.sqrt(embed * next_embed))
            of_embed = [
                Rule(most, widest, ratio, kernel)
                for ratio, kernel in runs([point for point in here if point.embed == embed], tie)
            ]
            alike = [replace(rule, max_embed=widest) for rule in of_batch[-len(of_embed) :]]
            if len(of_embed) == 1 and of_embed == alike and of_batch[-1].max_ratio == ANY:
                del of_batch[-1]  # the narrower E's row says the same
            of_batch += of_embed
        found += of_batch
    return found


def chosen(rules: Sequence[Rule], point: Point, multiprocessors: int) -> str | None:
    """As chosen_kernel of plan.h reads them."""
    for rule in rules:
        fits = waves(point.rows, multiprocessors) <= rule.max_waves and point.embed <= rule.max_embed
        if fits and point.ratio <= rule.max_ratio and rule.kernel in point.times:
            return rule.kernel
    return None


def report(record: dict[str, Any], tie: float) -> list[str]:
    """The rows with where they come from, and what they cost."""
    facts, points = record["environment"], points_of(record["rows"])
    if not points:
        raise SystemExit("expected rows of prunevit:fused and so on: bench/fused_mlp.py --device cuda writes them")
    sm, units = facts["sm"], facts["multiprocessors"]
    rules = rules_of(points, units, tie)
    lines = [f"    // {facts['gpu']}, {facts['dtype']}, commit {facts['commit']}: {len(points)} problems measured"]
    lines += [rule.line(sm) for rule in rules]
    losses = sorted(((p.loss(chosen(rules, p, units) or ""), p) for p in points), key=lambda pair: -pair[0])
    lines.append(f"// at worst {losses[0][0]:.2f} times the best kernel's time")
    for p in points:
        if p.triton < min(p.times.values()):
            times = f"{p.triton:.1f} against {min(p.times.values()):.1f} µs"
            lines.append(
                f"// the Triton pair is faster at M={p.rows} E={p.embed} F={p.hidden}: {times}; tuning.json can name it"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="kRules from measured times")
    parser.add_argument("file", type=Path, help="a results file of bench/fused_mlp.py --device cuda")
    parser.add_argument("--tie", type=float, default=0.03, help="how much slower than the best counts as equal")
    options = parser.parse_args()
    print("\n".join(report(json.loads(options.file.read_text("utf-8")), options.tie)))


if __name__ == "__main__":
    main()
