"""The tables of docs/methods.md, from the results alone. What has not been run says so."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from grid import SCORES
from methods import ALL, FOR_AUTO, MAIN, MIXED, UNTRAINED
from setting import Setting

NOT_RUN = "not run"
WORDS = {"qk": "query-key pairs", "v": "values", "mlp": "MLP neurons", "channel": "residual channels", "head": "heads"}


class Results:
    """Cells and latencies, as `report.py` has committed them."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.setting, self.environment = record["setting"], record["environment"]
        self.cells, self.missing = record["cells"], record["missing"]
        self.latency = record["latency"]

    def find(self, **wanted: Any) -> list[dict[str, Any]]:
        """The records of all cells that have these values, those of unreachable budgets included."""
        return [r for r in self.cells if all(r["cell"].get(name) == value for name, value in wanted.items())]

    def values(self, fact: str, **wanted: Any) -> list[float]:
        return [r["facts"][fact] for r in self.find(**wanted) if fact in r["facts"]]

    def recovered(self, method: str, budget: float) -> list[float]:
        return self.values("accuracy", stage="recovered", method=method, budget=budget)

    def lasting(self, method: str, budget: float, batch: int) -> tuple[float, float] | None:
        """ms and speed-up over dense of the first seed's model."""
        names = self.values("checkpoint", stage="recovered", method=method, budget=budget, seed=0)
        models = self.latency["models"] if self.latency else {}
        found = models.get(names[0], {}).get(str(batch)) if names else None
        return (found["ms"], found["speedup"]) if found else None


def percent(values: Iterable[float], unreachable: bool = False) -> str:
    """A share, or mean and range of several."""
    shares = [100 * value for value in values]
    if not shares:
        return _missing(unreachable)
    mean = f"{statistics.mean(shares):.1f}"
    return mean if len(shares) == 1 else f"{mean} ({min(shares):.1f}–{max(shares):.1f})"


def _missing(unreachable: bool) -> str:
    return "cannot" if unreachable else NOT_RUN


def table(head: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """The first columns are words, the others numbers."""
    head = list(head)
    lines = [head, ["---"] * words + ["--:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main_point(r: Results) -> str:
    """Every method at the main budget."""
    s, rows = r.setting, []
    control = r.recovered("dense", s["main"])
    for method in ("dense", *MAIN, MIXED, "gohsp, ranking alone", *FOR_AUTO):
        here = {"stage": "recovered", "method": method, "budget": s["main"]}
        first = {**here, "seed": 0}
        beyond = any("unreachable" in c["facts"] for c in r.find(**here))
        times = [r.lasting(method, s["main"], batch) for batch in (1, 32)]
        after = r.values("accuracy", **here)
        less = statistics.mean(control) - statistics.mean(after) if control and after else None
        rows.append(
            [
                "dense, trained on as long" if method == "dense" else method,
                percent(r.values("macs_share", **first), beyond),
                percent(r.values("params_share", **first), beyond),
                *(_missing(beyond) if t is None else f"{t[0]:.2f} ms, {t[1]:.2f} ×" for t in times),
                percent(r.values("cut", **here), beyond),
                percent(after, beyond),
                str(len(after)),
                _missing(beyond) if less is None else f"{-100 * less + 0.0:+.1f}",
            ]
        )
    head = ("method", "MACs", "parameters", "batch 1", "batch 32", "cut", "recovered", "seeds", "against dense")
    return table(head, rows)


def budgets(r: Results) -> str:
    """After recovery, at every budget."""
    s = r.setting
    shares = sorted({s["main"], *s["others"]}, reverse=True)
    rows = []
    for method in MAIN:
        row = []
        for share in shares:
            cells = r.find(stage="recovered", method=method, budget=share)
            row.append(percent(r.recovered(method, share), any("unreachable" in c["facts"] for c in cells)))
        rows.append([method, *row])
    return table(("recovered, at MACs of", *(f"{share:.0%}" for share in shares)), rows)


def untrained(r: Results) -> str:
    """Right after the cut."""
    rows, dense = [], r.values("accuracy", stage="cut", method="dense")
    for method in UNTRAINED:
        row = [percent(dense)]
        for share in r.setting["cuts"]:
            cells = r.find(stage="cut", method=method, budget=share)
            row.append(
                percent(
                    (c["facts"]["accuracy"] for c in cells if "accuracy" in c["facts"]),
                    any("unreachable" in c["facts"] for c in cells),
                )
            )
        rows.append([method, *row])
    return table(("cut, at MACs of", "100%", *(f"{share:.0%}" for share in r.setting["cuts"])), rows)


def one_kind(r: Results) -> str:
    """Each score on each kind of unit by itself."""
    rows = []
    for kind, scores in SCORES.items():
        for score in scores:
            found = (
                r.values("accuracy", stage="one kind", kind=kind, score=score, ratio=x) for x in r.setting["ratios"]
            )
            rows.append([WORDS[kind], score, *(percent(values) for values in found)])
    head = ("what goes", "ranked by", *(f"{x:.0%} of them gone" for x in r.setting["ratios"]))
    return table(head, rows, words=2)


def maps(r: Results) -> str:
    """How far the attention maps move when query-key pairs go."""
    rows = []
    for score in SCORES["qk"]:
        found = (r.values("map_error", stage="one kind", kind="qk", score=score, ratio=x) for x in r.setting["ratios"])
        rows.append([score, *(percent(values) for values in found)])
    return table(("error of the attention maps, %", *(f"{x:.0%} of pairs gone" for x in r.setting["ratios"])), rows)


def agreement(r: Results) -> str:
    rows = []
    for kind in ALL:
        found = [r.values("spearman", stage="agreement", kind=kind, scores=["snp", o]) for o in ("magnitude", "taylor")]
        rows.append([WORDS[kind], *(f"{values[0]:+.2f}" if values else NOT_RUN for values in found)])
    return table(("rank correlation of SNP's score with", "magnitude", "taylor"), rows)


def auto(r: Results) -> str:
    """MACs of auto over those of a rival at the same accuracy, the rival's curve interpolated."""
    s, rows = r.setting, []
    shares = sorted({s["main"], *s["others"]}, reverse=True)
    compared = [
        ("cut", "auto", "snp, inner"),
        ("cut", "auto by magnitude", "magnitude, inner"),
        ("cut", "auto", "cp-vit"),
        ("cut", "auto by magnitude", "cp-vit"),
        ("recovered", "auto", "snp, inner"),
        ("recovered", "auto", "cp-vit"),
        ("recovered", "auto, in rounds", "snp, inner, in rounds"),
        ("recovered", "auto, in rounds", "cp-vit"),
    ]
    for stage, ours, rival in compared:
        curve = curve_of(r, stage, rival)
        row = []
        for share in shares:
            cells = [
                c["facts"] for c in r.find(stage=stage, method=ours, budget=share, seed=0) if "accuracy" in c["facts"]
            ]
            row.append(equal_accuracy(cells[0], curve) if cells and len(curve) > 1 else NOT_RUN)
        rows.append([f"{ours}, {stage}", rival, *row])
    return table(("auto", "against", *(f"auto at {share:.0%}" for share in shares)), rows, words=2)


def curve_of(r: Results, stage: str, method: str) -> list[tuple[float, float]]:
    """(MACs, accuracy) of a method's cells, and of the dense model that they are cut from or compared with."""
    dense = r.values("accuracy", stage=stage, method="dense", seed=0)
    cells = [c["facts"] for c in r.find(stage=stage, method=method, seed=0) if "accuracy" in c["facts"]]
    return [(1.0, a) for a in dense] + [(facts["macs_share"], facts["accuracy"]) for facts in cells]


def equal_accuracy(facts: dict[str, float], curve: list[tuple[float, float]]) -> str:
    """auto's MACs as a share of what the rival needs for the same accuracy; outside its curve, both accuracies."""
    accuracy = facts["accuracy"]
    needed = macs_at(accuracy, curve)
    if needed is None:
        best = max(curve, key=lambda point: point[1])
        macs, nearest = best if accuracy > best[1] else min(curve)
        return f"accuracy {accuracy:.1%}; the rival's is {nearest:.1%} at {macs:.0%} of the MACs"
    return f"{facts['macs_share'] / needed:.0%}"


def macs_at(accuracy: float, curve: list[tuple[float, float]]) -> float | None:
    """The least MACs at which a piecewise linear curve of (MACs, accuracy) reaches an accuracy; None outside it."""
    points = sorted(curve)
    if points[0][1] >= accuracy:
        return None if points[0][1] > accuracy else points[0][0]
    for (x0, y0), (x1, y1) in pairwise(points):
        if y0 < accuracy <= y1:
            return x0 + (x1 - x0) * (accuracy - y0) / (y1 - y0)
    return None


def setup(r: Results) -> str:
    """The dense model, the command, and what has not been run."""
    s, env, lines = r.setting, r.environment, []
    side, worst = s["image"] // s["patch"], 50 / math.sqrt(s["probed"])
    found = r.find(stage="dense")
    trained = f"{s['epochs']} epochs"
    if s["patch_drop"]:
        trained += f" with {s['patch_drop']:.0%} of the patches dropped"
    lines.append(
        f"A ViT of width {s['width']}, depth {s['depth']}, {s['heads']} heads and patches of {s['patch']} pixels "
        f"({side * side + 1} tokens), trained for {trained}."
    )
    if found:
        facts = found[0]["facts"]
        lines.append(
            f"It has {facts['params'] / 1e6:.2f} M parameters and {facts['macs'] / 1e6:.1f} MMAC, and gets "
            f"{facts['accuracy']:.1%} of {s['test']:,} test images right."
        )
    lines.append(
        f"Recovery is {s['steps']} steps of {s['batch']} images. Models that are cut and not trained are tested on "
        f"{s['probed']:,} test images (standard error {worst:.1f} points at most)."
    )
    small = r.find(stage="small")
    if small:
        facts = small[0]["facts"]
        lines.append(
            f"A dense model of width {s['small_width']} ({facts['macs_share']:.1%} of the MACs), trained and recovered "
            f"in as many steps, gets {facts['accuracy']:.1%}."
        )
    lines += [
        f"fp32, {env['threads']} threads of an {env['cpu']}; prunevit {env['prunevit']}, torch {env['torch']}, "
        f"timm {env['timm']}.",
        f"\n`python examples/cifar10/run.py --data DIR --out OUT{_options(s)}`",
    ]
    if r.missing:
        lines.append("\n**Not run yet:** " + "; ".join(_brief(r.missing)) + ".")
    return "\n".join(lines)


def _options(setting: dict[str, Any]) -> str:
    """What differs from the defaults, as run.py takes it."""
    changed = {name: v for name, v in setting.items() if v != Setting().to_dict()[name]}
    words = {n: " ".join(f"{x:g}" for x in (v if isinstance(v, list) else [v])) for n, v in changed.items()}
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in words.items())


def _brief(missing: list[dict[str, Any]]) -> list[str]:
    """The missing cells by what they are: stage and method or kind, then how many."""
    groups: dict[str, list[str]] = {}
    for cell in missing:
        stage, *where = [f"{value:.0%}" if isinstance(value, float) else str(value) for value in cell.values()]
        what, *rest = where[:-1] or [""]
        groups.setdefault(f"{stage} {what}".strip(), []).append(" ".join([*rest, f"seed {where[-1]}"]))
    return [
        f"{what} ({len(cells)}: {', '.join(cells)})" if len(cells) < 4 else f"{what} ({len(cells)} cells)"
        for what, cells in groups.items()
    ]
