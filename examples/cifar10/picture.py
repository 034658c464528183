"""The Pareto picture: accuracy against MACs, right after the cut and recovered, and against measured latency."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from methods import MAIN
from tables import Results

INK, SOFT = "#1f2933", "#7b8794"
COLOURS = {
    "snp": "#2f6db5",
    "gohsp": "#8a63b8",
    "auto": "#c2487e",
    "cp-vit": "#3d9a74",
    "magnitude": "#e8893b",
    "taylor": "#b59a1f",
    "random": "#7b8794",
}
MARKERS = dict(zip(COLOURS, "osD^vPX"))


def draw(results: Results, path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(12, 4.4), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        cut, recovered, timed = figure.subplots(1, 3)
        _cut(cut, results)
        _recovered(recovered, results)
        _timed(timed, results)
        handles, labels = cut.get_legend_handles_labels()
        more = [pair for axes in (recovered, timed) for pair in zip(*axes.get_legend_handles_labels())]
        for handle, label in more:
            if label not in labels:
                handles.append(handle)
                labels.append(label)
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=9, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def _cut(axes: Any, r: Results) -> None:
    dense = r.values("accuracy", stage="cut", method="dense")
    for method in MAIN:
        named = "gohsp, ranking alone" if method == "gohsp" else method
        points = _curve(r, "cut", named, r.setting["cuts"])
        points += [(100.0, *[100 * dense[0]] * 3)] if dense and points else []
        _line(axes, method, points)
    if dense:
        axes.plot(100, 100 * dense[0], "*", color=INK, markersize=11)
    _name(axes, "right after the cut", "MACs, % of dense")


def _recovered(axes: Any, r: Results) -> None:
    s = r.setting
    for method in MAIN:
        _line(axes, method, _curve(r, "recovered", method, (s["main"], *s["others"])))
    control = r.recovered("dense", s["main"])
    if control:
        axes.plot(100, 100 * statistics.mean(control), "*", color=INK, markersize=11, label="dense, trained on as long")
    for record in r.find(stage="small"):
        facts = record["facts"]
        point = (100 * facts["macs_share"], 100 * facts["accuracy"])
        axes.plot(*point, "*", color=SOFT, markersize=11, label="a smaller dense model")
    _name(axes, f"recovered for {s['steps']} steps", "MACs, % of dense")


def _timed(axes: Any, r: Results) -> None:
    s = r.setting
    for method in ("dense", *MAIN):
        points = []
        for budget in (s["main"], *s["others"]):
            time, found = r.lasting(method, budget, 32), r.recovered(method, budget)
            if time and found:
                points.append((time[0], *(100 * x for x in (statistics.mean(found), min(found), max(found)))))
        if method == "dense" and points:
            axes.plot(*points[0][:2], "*", color=INK, markersize=11)
        else:
            _line(axes, method, points)
    models = r.latency["models"] if r.latency else {}
    if not models:
        axes.text(0.5, 0.5, "not measured yet", color=SOFT, ha="center", transform=axes.transAxes)
    for record in r.find(stage="small"):
        facts = record["facts"]
        if facts["checkpoint"] in models:
            point = (models[facts["checkpoint"]]["32"]["ms"], 100 * facts["accuracy"])
            axes.plot(*point, "*", color=SOFT, markersize=11)
    _name(axes, "recovered, in prunevit's runtime", "ms for 32 images")


def _curve(r: Results, stage: str, method: str, budgets: Any) -> list[tuple[float, ...]]:
    points: list[tuple[float, ...]] = []
    for budget in budgets:
        found = [c["facts"] for c in r.find(stage=stage, method=method, budget=budget) if "accuracy" in c["facts"]]
        if found:
            accuracies = [100 * facts["accuracy"] for facts in found]
            macs = 100 * statistics.mean(facts["macs_share"] for facts in found)
            points.append((macs, statistics.mean(accuracies), min(accuracies), max(accuracies)))
    return points


def _line(axes: Any, method: str, points: list[tuple[float, ...]]) -> None:
    if not points:
        return
    x, mean, low, high = zip(*sorted(points))
    spread = [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]]
    style = {"color": COLOURS[method], "marker": MARKERS[method], "markersize": 5, "linewidth": 1.3, "capsize": 2}
    axes.errorbar(x, mean, yerr=spread, label=method, **style)


def _name(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", size=10, color=INK)
    axes.set_xlabel(below, color=SOFT)
    axes.set_ylabel("test accuracy, %", color=SOFT)
    axes.grid(color="#e6e9ed", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=SOFT)
