"""Budgets: how much has to go. Costs are those of the spec that a plan leaves, recounted exactly, never estimated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeAlias

from .._units import SYMBOLS, read_amount
from ..errors import BudgetError, PruningError, expect
from ..spec import ViTSpec
from .groups import Group, Kind, Remainder, Scores
from .plan import Plan
from .ranking import Bundle, Ranking

Cost: TypeAlias = Callable[[ViTSpec], float]
Constraints: TypeAlias = Mapping[str, str | float]

COSTS: dict[str, Cost] = {"macs": lambda spec: spec.macs(), "params": lambda spec: spec.params()}
TOLERANCE = 0.01  # of dense: what a result may stay below its limit, where units are small enough


@dataclass(frozen=True)
class Limit:
    """One constraint: the result costs at most ``most``, where the dense model costs ``dense``."""

    name: str
    most: float
    dense: float
    cost: Cost

    def met(self, spec: ViTSpec) -> bool:
        return self.cost(spec) <= self.most

    def close(self, spec: ViTSpec) -> bool:
        return self.most - self.cost(spec) <= TOLERANCE * self.dense

    def expect_reachable(self, floor: ViTSpec, units: str, remedy: str) -> None:
        """Raise :class:`BudgetError` unless ``floor``, what is left when all units that may go have gone, meets it."""
        if not self.met(floor):
            least, unit = self.cost(floor), SYMBOLS.get(self.name, "")
            raise BudgetError(
                f"{self.name}: expected at most {self.most:,.6g}{unit}, but the irreducible floor is "
                f"{least:,.6g}{unit} ({least / self.dense:.1%} of {self.dense:,.6g}{unit}) when every {units} that may "
                f"go has gone: {remedy}"
            )


@dataclass(frozen=True)
class Budget:
    """Every limit holds, or :class:`BudgetError` says what cannot go below what.

    The result is below each limit by at most the larger of 1 % of dense and the smallest unit that was left to restore.
    Without limits, what ``ranking.pruning_ratio`` says goes and nothing else; with a ``shape`` the result has exactly
    that shape, and scores only say which indices are kept.
    """

    limits: tuple[Limit, ...] = ()
    ranking: Ranking = field(default_factory=Ranking)
    shape: ViTSpec | None = None

    @classmethod
    def of(
        cls,
        spec: ViTSpec,
        constraints: Constraints | None,
        cost: Cost | Mapping[str, Cost] | None = None,
        ranking: Ranking | None = None,
        shape: ViTSpec | None = None,
    ) -> Budget:
        """Read constraints on what remains of ``spec``: shares ("45%") or absolute numbers (2.0e9, "2.0G")."""
        ranking = ranking or Ranking()
        constraints = dict(constraints or {})
        enough = bool(constraints) or shape is not None or ranking.pruning_ratio is not None
        expect(enough, PruningError, "constraints, a shape or a pruning_ratio that says how much goes", got="none")
        expect(not constraints or shape is None, PruningError, "constraints or a shape", got="both")
        costs = COSTS | costs_by_name(constraints, cost)
        # whoever measures takes seconds: no spec twice
        costs |= {name: cache(measure) for name, measure in costs.items() if name not in COSTS}
        for name in constraints:
            what = f"constraints out of {', '.join(sorted(costs))} (others need a cost=callable)"
            expect(name in costs, PruningError, what, got=repr(name))
        if shape is not None:
            _expect_widths_alone(spec, shape)
        limits = []
        for name, value in constraints.items():
            dense = float(costs[name](spec))
            limits.append(Limit(name, _amount(name, value, dense), dense, costs[name]))
        return cls(tuple(limits), ranking, shape)

    def kinds(self, spec: ViTSpec, default: tuple[Kind, ...]) -> tuple[Kind, ...]:
        """The kinds of group to score: those asked for, or those that the shape differs in, or the method's own."""
        if self.shape is not None:
            return _differing(spec, self.shape)
        return self.ranking.groups or tuple(k for k in default if k != "channel" or spec.attn_pool is None)

    def plan(self, dense: ViTSpec, scores: Scores, first: Mapping[Group, Group] | None = None) -> Plan:
        """The plan that drops the lowest units, as few as meet every limit.

        ``first`` has groups as they were in the model that ratios count from, where that is not ``dense``.
        """
        if self.shape is not None:
            return _to_shape(dense, self.shape, scores, self.ranking.rescale_norms)
        left = Remainder(dense)
        fixed, order = (
            [bundle for bundle in bundles if bundle.group.kind == "channel" or left.take(bundle.group, bundle.units)]
            for bundles in self.ranking.order(scores, first, left)
        )
        return _Search(dense, self, fixed, order, sorted({group.kind for group in scores})).run()

    def met(self, spec: ViTSpec) -> bool:
        return all(limit.met(spec) for limit in self.limits)


def mappings_of(constraints: Constraints | Sequence[Constraints] | None) -> list[Constraints]:
    """One mapping, or one for each method; anything else is refused by name."""
    several = isinstance(constraints, Sequence) and not isinstance(constraints, str)
    each: list[Any] = list(constraints) if several else [constraints or {}]  # type: ignore[arg-type]
    fits = bool(each) and all(isinstance(mapping, Mapping) for mapping in each)
    expect(fits, PruningError, 'constraints such as {"macs": "45%"}', got=repr(constraints))
    return each


class _Search:
    """Bisection over how many bundles go, then restoring what a last, large one took too much."""

    def __init__(
        self, dense: ViTSpec, budget: Budget, fixed: list[Bundle], order: list[Bundle], kinds: Sequence[Kind]
    ) -> None:
        self.dense, self.budget, self.fixed, self.order, self.kinds = dense, budget, fixed, order, kinds

    def run(self) -> Plan:
        few, many = 0, len(self.order)
        plan = self.drop(self.order[:few])
        if self.budget.met(plan.spec()):
            return plan
        self.expect_reachable()
        while many - few > 1:
            middle = (few + many) // 2
            if self.budget.met(self.drop(self.order[:middle]).spec()):
                many = middle
            else:
                few = middle
        return self.restore(self.order[:many])

    def drop(self, bundles: list[Bundle]) -> Plan:
        dropped: dict[Group, list[int]] = {}
        for bundle in (*self.fixed, *bundles):
            dropped.setdefault(bundle.group, []).extend(bundle.units)
        return Plan.without(self.dense, dropped, rescale_norms=self.budget.ranking.rescale_norms)

    def restore(self, gone: list[Bundle]) -> Plan:
        plan = self.drop(gone)
        full: set[str] = set()  # layers whose next unit does not fit: nor does any later one, for the cost only grows
        for bundle in reversed(gone):
            if any(limit.close(plan.spec()) for limit in self.budget.limits):
                break
            address = bundle.group.address(bundle.units[0])
            if address in full:
                continue
            rest = [other for other in gone if other is not bundle]
            more = self.drop(rest)
            if self.budget.met(more.spec()):
                gone, plan = rest, more
            else:
                full.add(address)
        return plan

    def expect_reachable(self) -> None:
        floor = self.drop(self.order).spec()
        remedy = "allow more groups, or less min_kept, max_pruning_ratio or ignored_layers"
        for limit in self.budget.limits:
            limit.expect_reachable(floor, f"{', '.join(self.kinds)} unit", remedy)


def costs_by_name(constraints: Iterable[str], cost: Cost | Mapping[str, Cost] | None) -> dict[str, Cost]:
    """``cost`` as a mapping: a single one belongs to the one constraint that is not counted here."""
    if cost is None or isinstance(cost, Mapping):
        return dict(cost or {})
    others = sorted(set(constraints) - set(COSTS))
    expect(len(others) == 1, PruningError, "one constraint for the one cost, or costs by name", got=others)
    return {others[0]: cost}


def _amount(name: str, value: str | float, dense: float) -> float:
    """The most that may remain, in the cost's own unit: milliseconds of latency, bytes of memory, else a count."""
    try:
        amount, share = read_amount(name, value) if isinstance(value, str) else (float(value), False)
    except (TypeError, ValueError) as error:
        what = str(error) if isinstance(value, str) else f'{name}: expected a share such as "45%" or a number'
        raise BudgetError(what if isinstance(value, str) else f"{what}, got {value!r}") from None
    expect(0 < amount < float("inf"), BudgetError, f"{name} to be a positive number", got=value)
    if not share and name in COSTS and amount <= 1:
        raise BudgetError(f'{name}: expected a share such as "{amount:.0%}" or a count, got {value!r}')
    return amount * dense if share else amount


def _expect_widths_alone(dense: ViTSpec, shape: ViTSpec) -> None:
    """Refuse a shape that differs in more than widths: no score says which tokens or channels of a list to keep."""
    expect(dense.depth == shape.depth, PruningError, f"a shape of {dense.depth} blocks", got=shape.depth)
    for i, (have, want) in enumerate(zip(dense.blocks, shape.blocks)):
        for name in ("select", "attn_reads", "attn_writes", "mlp_reads", "mlp_writes"):
            given, asked, where = getattr(have, name), getattr(want, name), f"blocks.{i}.{name}"
            got = "another: shape= changes widths alone, so prune by constraints or by a method that makes it"
            expect(given == asked, PruningError, f"a shape whose {where} is the model's", got=got)
            fits = name == "select" or given is None or dense.embed_dim == shape.embed_dim
            expect(fits, PruningError, f"a shape of width {dense.embed_dim}, for {where}", got=shape.embed_dim)


def _differing(dense: ViTSpec, shape: ViTSpec) -> tuple[Kind, ...]:
    kinds: set[Kind] = set()
    if dense.embed_dim != shape.embed_dim:
        kinds.add("channel")
    for have, want in zip(dense.blocks, shape.blocks):
        if have.num_heads != want.num_heads:
            kinds.add("head")
        if have.qk_dims != want.qk_dims:
            kinds.add("qk")
        if have.v_dims != want.v_dims:
            kinds.add("v")
        if have.mlp_dim != want.mlp_dim:
            kinds.add("mlp")
    return tuple(kinds)


def _to_shape(dense: ViTSpec, shape: ViTSpec, scores: Scores, rescale_norms: bool) -> Plan:
    """Keep the best units of each group, as many as ``shape`` has; kept heads take its widths in order."""
    best = {group: score.double().argsort(descending=True, stable=True).tolist() for group, score in scores.items()}
    places: dict[int, list[int]] = {}
    for group, ranked in best.items():
        if group.kind == "head":
            places[group.block] = sorted(ranked[: shape.blocks[group.block].num_heads])

    def size(group: Group) -> int:
        if group.kind == "channel":
            return shape.embed_dim
        block = shape.blocks[group.block]
        if group.kind == "mlp":
            return block.mlp_dim
        if group.kind == "head":
            return block.num_heads
        heads = places.get(group.block, list(range(dense.blocks[group.block].num_heads)))
        dims = block.qk_dims if group.kind == "qk" else block.v_dims
        return dims[heads.index(group.head)] if group.head in heads else group.size

    dropped = {group: ranked[size(group) :] for group, ranked in best.items()}
    removed = [
        (part, i)
        for i, block in enumerate(shape.blocks)
        for part in ("has_attn", "has_mlp")
        if getattr(dense.blocks[i], part) and not getattr(block, part)
    ]
    for part, i in removed:
        layer = f"blocks.*.{part.removeprefix('has_')}.sublayer"
        dropped.setdefault(Group("sublayer", layer, dense.depth, blocks=tuple(range(dense.depth))), []).append(i)
    plan = Plan.without(dense, dropped, rescale_norms=rescale_norms)
    for i, (got, want) in enumerate(zip(plan.spec().blocks, shape.blocks)):
        same = (got.qk_dims, got.v_dims, got.mlp_dim) == (want.qk_dims, want.v_dims, want.mlp_dim)
        expect(same, PruningError, f"a shape within the dense model's, block {i} {want}", got=got)
    width = plan.spec().embed_dim
    expect(width == shape.embed_dim, PruningError, f"a shape of width at most {width}", got=shape.embed_dim)
    return plan
