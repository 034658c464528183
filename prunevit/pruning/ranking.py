"""Ranking: from a score for each unit to one order in which units go. The options have Torch-Pruning's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import PruningError, expect
from ..spec import ViTSpec
from .groups import KINDS, Group, Kind, Remainder, Scores, check_kinds, groups_of, matches

Normalizer = Literal["mean", "sum", "max", "standardization", "gaussian", "lamp"]
Floats: TypeAlias = NDArray[np.float64]

_TINY = 1e-9  # 64 · (1 − 0.8) is 12.799…, but 10 · (1 − 0.9) should be 1
_NEVER_EMPTY = ("qk", "v", "channel", "read")  # without its last one, a head or a model has no meaning


@dataclass(frozen=True)
class Bundle:
    """Units of one group that go together (one, unless ``round_to`` says more). The lowest ``key`` goes first."""

    group: Group
    units: tuple[int, ...]
    key: float
    score: float


@dataclass(frozen=True)
class Ranking:
    """How scores are compared and what may go.

    ``groups``: the kinds to prune (None: the method's own). Ranks are taken in each group alone, so that every group
    gives up the same share (the default, but of gohsp); with ``isomorphic`` among all groups of a kind; with
    ``global_pruning`` among all units, each score divided within its layer as ``normalizer`` says of those above −∞
    (None: raw scores). Only the last two compare layers: in a group alone ``normalizer`` changes no rank.
    ``pruning_ratio`` drops a fixed share first: of every group, or by address pattern (``{"blocks.0.*": 0.2, "qk":
    0.5}``, the last match counts); a constraint then takes what it needs beyond. ``max_pruning_ratio`` bounds the share
    that any group loses, in the same two forms. Both are shares of the model that prune() is given, through however
    many methods and rounds; sublayers, which have an address each, are counted by the pattern that they match. A
    ``pruning_ratio`` is rounded up to whole units (any share of a single sublayer is that sublayer), a bound down.
    ``ignored_layers`` are address patterns that nothing is taken from.
    ``min_kept`` units of each group stay (a number, or one by kind: ``{"head": 0}`` lets a layer lose its last head,
    and keep its output bias); ``round_to`` makes kept counts multiples, in the same two forms. ``rescale_norms``
    multiplies LayerNorm weights by √(E/E′) when residual channels go.
    """

    groups: tuple[Kind, ...] | None = None
    global_pruning: bool = False
    isomorphic: bool | None = None
    normalizer: Normalizer | None = "mean"
    pruning_ratio: float | Mapping[str, float] | None = None
    max_pruning_ratio: float | Mapping[str, float] = 1.0
    ignored_layers: Sequence[str] = ()
    min_kept: int | Mapping[str, int] = 1
    round_to: int | Mapping[str, int] | None = None
    rescale_norms: bool = True

    def __post_init__(self) -> None:
        if self.groups is not None:
            expect(bool(self.groups), PruningError, f"groups out of {', '.join(KINDS)}, or None", got="none")
            object.__setattr__(self, "groups", check_kinds(self.groups))
        names = get_args(Normalizer)
        known = self.normalizer is None or self.normalizer in names
        expect(known, PruningError, f"normalizer out of {', '.join(names)} or None", got=repr(self.normalizer))
        one = not (self.global_pruning and self.isomorphic)
        expect(one, PruningError, "one of global_pruning and isomorphic", got="both")
        for name, least in (("min_kept", 0), ("round_to", 1)):
            value = getattr(self, name)
            for kind, count in value.items() if isinstance(value, Mapping) else [(KINDS[0], value)]:
                expect(kind in KINDS, PruningError, f"{name} by kinds out of {', '.join(KINDS)}", got=repr(kind))
                fine = count is None or (isinstance(count, int) and count >= least)
                expect(fine, PruningError, f"{name} to be a count of at least {least}", got=repr(count))
        for name in ("pruning_ratio", "max_pruning_ratio"):
            value = getattr(self, name)
            for ratio in value.values() if isinstance(value, Mapping) else [value]:
                fine = ratio is None or 0 <= ratio <= 1
                expect(fine, PruningError, f"{name} between 0 and 1, the share that goes", got=ratio)

    def order(
        self, scores: Scores, first: Mapping[Group, Group] | None = None, left: Remainder | None = None
    ) -> tuple[list[Bundle], list[Bundle]]:
        """What ``pruning_ratio`` drops at once, and all else that may go, each first to last.

        ``first`` has groups as they were in the model that ratios count from, where they have lost units since. All
        channels that may go are taken from ``left``, those that have to stay are in no bundle.
        """
        values = {group: _checked(group, score.double().cpu().numpy()) for group, score in scores.items()}
        compared = self._compared(values)
        fixed, rest = list[Bundle](), list[Bundle]()
        for group, score in values.items():
            candidates, at_once, ends = self._candidates(group, (first or {}).get(group, group), score, left)
            for begin, end in pairwise([0, *ends]):
                units = candidates[begin:end]
                # alone in its group, a unit's key is the share of the group that has gone with it
                key = end / group.size if compared is None else float(compared[group][units].mean())
                bundle = Bundle(group, tuple(sorted(units)), key, float(score[units].mean()))
                (fixed if end <= at_once else rest).append(bundle)
        by_key = attrgetter("key", "score")
        return sorted(fixed, key=by_key), sorted(rest, key=by_key)

    def _candidates(
        self, group: Group, first: Group, score: Floats, left: Remainder | None
    ) -> tuple[list[int], int, list[int]]:
        """The units that may go, first to last; how many of them go at once; and where each bundle ends."""
        order = [int(u) for u in np.argsort(score, kind="stable")]
        order = [u for u in order if not any(matches(group.address(u), p) for p in self.ignored_layers)]
        wanted = _within(self.pruning_ratio or 0.0, order, group, first, most=False)
        # what a ratio names goes first, though it may rank highest
        allowed = _within(self.max_pruning_ratio, dict.fromkeys([*wanted, *order]), group, first, most=True)
        if left is not None and group.kind == "channel":
            # one by one: refused with its bundle, a channel would leave a width that is no multiple of round_to
            allowed = [u for u in allowed if left.take(group, (u,))]
        keep = max(self._of_kind(self.min_kept, group, 1), int(group.kind in _NEVER_EMPTY))
        allowed = allowed[: max(0, group.size - keep)]
        step = self._of_kind(self.round_to, group, 1) or 1
        ends = [end for end in range(1, len(allowed) + 1) if (group.size - end) % step == 0]
        at_once = max([0, *(end for end in ends if end <= len({*wanted} & {*allowed}))])
        return allowed, at_once, ends

    def _compared(self, values: Mapping[Group, Floats]) -> dict[Group, Floats] | None:
        """Scores that may be compared across groups; None where each group is ranked alone."""
        if not (self.global_pruning or self.isomorphic):
            return None
        layers: dict[str, list[Group]] = {}
        for group in values:
            layers.setdefault(group.layer, []).append(group)
        normal: dict[Group, Floats] = {}
        for members in layers.values():
            joined = _normalised(np.concatenate([values[group] for group in members]), self.normalizer)
            normal |= zip(members, _split(joined, members))
        if self.global_pruning:
            return normal
        for kind in KINDS:
            members = [group for group in values if group.kind == kind]
            if members:
                joined = np.concatenate([normal[group] for group in members])
                normal |= zip(
                    members, _split((np.argsort(np.argsort(joined, kind="stable")) + 1) / len(joined), members)
                )
        return normal

    def expect_patterns(self, spec: ViTSpec, kinds: Iterable[Kind]) -> None:
        """Refuse a pattern that names nothing in the model, or a ratio of none of the ``kinds`` that are pruned."""
        of_ratio = self.pruning_ratio if isinstance(self.pruning_ratio, Mapping) else ()
        of_most = self.max_pruning_ratio if isinstance(self.max_pruning_ratio, Mapping) else ()
        for patterns, among in (((*self.ignored_layers, *of_most), KINDS), (of_ratio, kinds)):
            addresses = {
                group.address(u)
                for group in groups_of(spec, among)
                for u in (range(group.size) if group.blocks else (0,))
            }
            for pattern in patterns:
                found = any(matches(address, pattern) for address in addresses)
                what = f"a pattern of addresses such as {sorted(addresses)[:3]}"
                expect(found, PruningError, what, got=repr(pattern))

    def _of_kind(self, value: int | Mapping[str, int] | None, group: Group, default: int) -> int:
        found = value.get(group.kind, default) if isinstance(value, Mapping) else value
        return default if found is None else found


def _within(
    ratio: float | Mapping[str, float], units: Iterable[int], group: Group, first: Group, *, most: bool
) -> list[int]:
    """The first of the units, as many as a ratio of the group as it was takes beyond what has gone since.

    What goes is rounded down where the ratio is the ``most``, else up. A pattern counts the units that it is the last
    to match.
    """

    def rule(address: str) -> tuple[str, float]:
        if not isinstance(ratio, Mapping):
            return "", ratio
        found = [(pattern, share) for pattern, share in ratio.items() if matches(address, pattern)]
        return found[-1] if found else ("", 1.0 if most else 0.0)

    def rules(of: Group) -> list[tuple[str, float]]:
        return [rule(of.address(u)) for u in range(of.size)] if of.blocks else [rule(of.layer)] * of.size

    now = rules(group)
    rest, picked = Counter(now), list[int]()
    for of, n in Counter(rules(first)).items():
        kept = n - int(n * of[1] + _TINY) if most else int(n * (1 - of[1]) + _TINY)
        rest[of] -= kept
    for u in units:
        if rest[now[u]] > 0:
            rest[now[u]] -= 1
            picked.append(u)
    return picked


def _split(joined: Floats, members: Sequence[Group]) -> Iterator[Floats]:
    return iter(np.split(joined, np.cumsum([group.size for group in members])[:-1]))


def _checked(group: Group, score: Floats) -> Floats:
    expect(score.shape == (group.size,), PruningError, f"{group.size} scores for {group.layer}", got=score.shape)
    fits = bool((score < np.inf).all())  # NaN is not
    expect(fits, PruningError, f"finite scores for {group.layer}, or −∞", got="NaN or infinity")
    return score


def _normalised(score: Floats, normalizer: Normalizer | None) -> Floats:
    live = np.isfinite(score)
    normal = score.copy()
    normal[live] = _scaled(score[live], normalizer) if live.any() else []
    return normal


def _scaled(score: Floats, normalizer: Normalizer | None) -> Floats:
    tiny = 1e-12
    if normalizer == "mean":
        score = score / max(score.mean(), tiny)
    elif normalizer == "sum":
        score = score / max(score.sum(), tiny)
    elif normalizer == "max":
        score = score / max(score.max(), tiny)
    elif normalizer == "standardization":
        score = (score - score.min()) / max(score.max() - score.min(), tiny)
    elif normalizer == "gaussian":
        score = (score - score.mean()) / max(score.std(), tiny)
    elif normalizer == "lamp":  # each score as a share of all that are not lower
        order = np.argsort(score, kind="stable")
        rest = np.cumsum(score[order][::-1])[::-1]
        score = score / np.maximum(rest[np.argsort(order)], tiny)
    return score
