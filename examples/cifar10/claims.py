"""What the published claims came to. Each row is made from the results, so that it changes when they do."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

from methods import CP_VIT_CLAIM
from tables import NOT_RUN, Results, curve_of, equal_accuracy, table

Row = tuple[str, str, str]
#: what is no difference to speak of: the standard error of an accuracy on 5,000 images is 0.7 points
LEVEL = 0.007


def claims(r: Results) -> str:
    """Claim, what was measured, and whether it held."""
    rows = [row for claim in CLAIMS for row in claim(r)]
    return table(("claim", "measured here", "held"), rows, words=3)


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _against(found: dict[str, float | None], ours: str, *, error: bool = False) -> tuple[str, str]:
    """The values in words, and whether ours is the best of them; an ``error`` is better when it is small."""
    known = {name: value for name, value in found.items() if value is not None}
    if len(known) < len(found):
        return (_listed(known), "not all run") if known else (NOT_RUN, "–")
    ahead = [(value - known[ours]) if error else (known[ours] - value) for name, value in known.items() if name != ours]
    if abs(min(ahead)) < LEVEL:
        return _listed(known), "level with the best"
    return _listed(known), "yes" if min(ahead) > 0 else f"no: ahead of {sum(a > 0 for a in ahead)} of {len(ahead)}"


def _listed(known: dict[str, float]) -> str:
    return "; ".join(f"{name.replace(', ', ' ')} {100 * value:.1f}" for name, value in known.items())


def _snp_maps(r: Results) -> Iterator[Row]:
    for ratio in r.setting["ratios"]:
        scores = ("snp", "magnitude", "taylor", "random")
        found = {x: _mean(r.values("map_error", stage="one kind", kind="qk", score=x, ratio=ratio)) for x in scores}
        yield (
            f"SNP: its ranking of query-key pairs preserves attention, {ratio:.0%} gone",
            *_against(found, "snp", error=True),
        )


def _snp_ranking(r: Results) -> Iterator[Row]:
    main, rivals = r.setting["main"], ("snp", "magnitude", "taylor", "random")
    for stage, words in (("cut", "before recovery"), ("recovered", "recovered")):
        found = {m: _mean(r.values("accuracy", stage=stage, method=m, budget=main)) for m in rivals}
        yield f"SNP keeps more accuracy than other rankings at {main:.0%} of the MACs, {words}", *_against(found, "snp")


def _snp_small(r: Results) -> Iterator[Row]:
    main = r.setting["main"]
    claim = "SNP: a pruned large model beats a dense small one at equal latency"
    small, ours, time = r.find(stage="small"), r.recovered("snp", main), r.lasting("snp", main, 32)
    models = r.latency["models"] if r.latency else {}
    if not (small and ours and time and small[0]["facts"]["checkpoint"] in models):
        yield claim, NOT_RUN, "–"
        return
    facts = small[0]["facts"]
    ms = models[facts["checkpoint"]]["32"]["ms"]
    measured = (
        f"snp {100 * statistics.mean(ours):.1f} in {time[0]:.2f} ms, dense {100 * facts['accuracy']:.1f} in {ms:.2f} ms"
    )
    better, slower = statistics.mean(ours) > facts["accuracy"], time[0] > 1.02 * ms
    yield claim, measured, "no" if not better else "yes, but slower" if slower else "yes"


def _gohsp_params(r: Results) -> Iterator[Row]:
    share = r.setting["claimed_params"]
    claim = f"GOHSP: {1 - share:.0%} fewer parameters at no loss"
    ours, control = r.recovered("gohsp, by params", share), r.recovered("dense", r.setting["main"])
    if not (ours and control):
        yield claim, NOT_RUN, "–"
        return
    before = r.values("accuracy", stage="dense")[0]
    lost = statistics.mean(control) - statistics.mean(ours)
    measured = (
        f"gohsp {100 * statistics.mean(ours):.1f}; dense {100 * statistics.mean(control):.1f} after as many steps, "
        f"{100 * before:.1f} before them"
    )
    above = " (yes against the dense model as it was)" if statistics.mean(ours) >= before else ""
    yield claim, measured, "yes" if lost <= 0 else f"no: {100 * lost:.1f} points lost{above}"


def _gohsp_heads(r: Results) -> Iterator[Row]:
    for ratio in r.setting["ratios"]:
        for ours in ("gohsp, central", "gohsp, peripheral"):
            scores = (ours, "magnitude", "taylor", "random")
            found = {
                x: _mean(r.values("accuracy", stage="one kind", kind="head", score=x, ratio=ratio)) for x in scores
            }
            yield (
                f"GOHSP: its ranking of heads is the best, {ratio:.0%} gone, before recovery",
                *_against(found, ours),
            )


def _auto(r: Results) -> Iterator[Row]:
    main = r.setting["main"]
    for stage, ours, rival in (
        ("cut", "auto", "snp, inner"),
        ("recovered", "auto, in rounds", "snp, inner, in rounds"),
        ("cut", "auto by magnitude", "magnitude, inner"),
        ("cut", "auto by magnitude", "cp-vit"),
        ("recovered", "auto, in rounds", "cp-vit"),
    ):
        claim = f"auto: 56.91 % of a fixed ratio's MACs at equal accuracy ({ours}, against {rival}; {stage})"
        cells = [c["facts"] for c in r.find(stage=stage, method=ours, budget=main, seed=0) if "accuracy" in c["facts"]]
        curve = curve_of(r, stage, rival)
        if not cells or len(curve) < 2:
            yield claim, NOT_RUN, "–"
            continue
        found = equal_accuracy(cells[0], curve)
        number = found.removesuffix("%")
        yield claim, found, ("yes" if float(number) <= 56.91 else "no") if number.isdigit() else "cannot be said"


def _cp_vit(r: Results) -> Iterator[Row]:
    control = r.recovered("dense", r.setting["main"])
    for budget in (r.setting["others"][0], CP_VIT_CLAIM):
        ours = r.recovered("cp-vit", budget)
        claim = f"CP-ViT: over 40 % of the MACs saved within one point (here {1 - budget:.0%} saved, recovered)"
        if r.find(stage="recovered", method="cp-vit", budget=budget) and not ours:
            yield claim, "below what its schedule can reach", "–"
        elif ours and control:
            lost = statistics.mean(control) - statistics.mean(ours)
            yield claim, f"{100 * lost:+.1f} points lost", "yes" if lost <= 0.01 else "no"
        else:
            yield claim, NOT_RUN, "–"


def _redundancy(r: Results) -> Iterator[Row]:
    for kind, words in (("v", "values"), ("mlp", "MLP neurons"), ("channel", "residual channels")):
        for ratio in r.setting["ratios"][1:2] or r.setting["ratios"]:
            scores = ("snp", "snp, reversed", "random")
            found = {x: _mean(r.values("accuracy", stage="one kind", kind=kind, score=x, ratio=ratio)) for x in scores}
            yield f"SNP: redundancy ranks {words} better than chance, {ratio:.0%} gone", *_against(found, "snp")


CLAIMS: tuple[Callable[[Results], Iterator[Row]], ...] = (
    _snp_maps,
    _snp_ranking,
    _redundancy,
    _snp_small,
    _gohsp_params,
    _gohsp_heads,
    _auto,
    _cp_vit,
)
