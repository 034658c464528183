"""auto: different pruning ratios for attention and MLP, found by iterative pruning and binary search.

"Automatic hyper-parameter search for vision transformer pruning" (PRAI 2023, §3): the attention (MHSA) and
feed-forward (FFN) modules get ratios of their own, searched at a finer and finer step, so that accuracy loss stays
under a bound in every round.

Our reading, for any scorer:

    ratio = {mhsa: 0, ffn: 0}; step = s0
    until the budget is met or step < s_min:
        for each part: bisect the largest ratio in (ratio, ratio + step] whose held-out accuracy drops by at most τ
        commit the part that saves most per accuracy lost; recompute scores (optionally after a short fine-tuning)
        if none is feasible: step /= 2

Accuracy is not monotone in the ratio: the far end is tried first, and taken if it holds; bisection keeps an end that
was measured to hold. The drop counts from the model that the round starts from, or from the dense one (``against``).
A ratio is of each group in the given model, rounded up to units; where a step is less than a unit, the next unit is
tried. The journal has the share of the part that is gone beside the ratio: less of it where units are protected.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from .._options import expect_at_least
from ..errors import BudgetError, PruningError, expect
from ..models import PrunedViT
from ..spec import ViTSpec
from .budget import Budget
from .groups import KINDS, Kind, check_kinds, groups_of
from .journal import Journal, Probe
from .method import Batches, Job, Method, Scorer, evaluating, read_batch
from .plan import Plan
from .recipe import Recipe
from .recover import accuracy, recover_for
from .scorers import SCORERS
from .surgery import compact
from .training_state import fingerprint

PARTS = ("mhsa", "ffn")


@dataclass(frozen=True)
class Auto(Method):
    """``tau`` is the accuracy that a round may lose; ``probes`` bisections refine each ratio.

    ``finetune_epochs`` of :func:`recover` with ``recipe`` follow each committed round. ``journal`` names a file that
    every probe is written to and an interrupted search continues from (in rounds or a list of methods the second search
    from ``JOURNAL.search2``, and so on). ``on_probe`` is called with each probe.
    """

    scorer: str | Scorer = "snp"
    tau: float = 0.01
    step: float = 0.2
    min_step: float = 0.02
    probes: int = 3
    against: Literal["round", "dense"] = "round"
    mhsa: Sequence[Kind] = ("qk", "v")
    ffn: Sequence[Kind] = ("mlp",)
    finetune_epochs: int = 0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    journal: str | os.PathLike[str] | None = None
    on_probe: Callable[[Probe], None] | None = None

    groups: ClassVar[tuple[Kind, ...]] = ("qk", "v", "mlp")
    heeds: ClassVar[tuple[str, ...]] = tuple(name for name in Method.heeds if name != "pruning_ratio")

    def __post_init__(self) -> None:
        if isinstance(self.scorer, str):
            known = sorted(SCORERS)
            expect(self.scorer in known, PruningError, f"a scorer out of {', '.join(known)}", got=repr(self.scorer))
        expect(
            0 < self.min_step <= self.step <= 1, PruningError, "0 < min_step ≤ step ≤ 1", got=(self.min_step, self.step)
        )
        expect(
            self.tau >= 0 and self.probes >= 0,
            PruningError,
            "tau and probes of at least 0",
            got=(self.tau, self.probes),
        )
        expect_at_least(self, "finetune_epochs", 0)
        Recipe.of(self.recipe)
        expect("epochs" not in self.recipe, PruningError, "epochs by finetune_epochs", got="a recipe with epochs")
        expect(self.against in ("round", "dense"), PruningError, "against round or dense", got=repr(self.against))

    def expect_fits(self, job: Job) -> None:
        expect(len(job.budget.limits) > 0, PruningError, "constraints that say where the search ends", got="none")
        if job.validation is None:
            raise PruningError("auto looks at accuracy: expected validation=held-out batches, got none")
        if self.finetune_epochs:
            job.training_data("finetune_epochs")
        known, asked = check_kinds((*self.kinds("mhsa"), *self.kinds("ffn"))), job.budget.ranking.groups or ()
        self.made_scorer().expect_supported(known)
        what = f"groups out of {', '.join(known)} (mhsa= and ffn= are the kinds that auto finds ratios for)"
        expect(set(asked) <= set(known), PruningError, what, got=", ".join(asked))

    def prune(self, job: Job) -> PrunedViT:
        return _Search(self, job).run()

    def made_scorer(self) -> Scorer:
        return SCORERS[self.scorer]() if isinstance(self.scorer, str) else self.scorer

    def kinds(self, part: str) -> tuple[Kind, ...]:
        return check_kinds(getattr(self, part))


class _Search:
    def __init__(self, options: Auto, job: Job) -> None:
        self.options, self.job, self.first = options, job, job.budget.limits[0]
        self.scorer, asked = options.made_scorer(), job.budget.ranking.groups or KINDS
        self.kinds = {part: check_kinds(set(asked) & set(options.kinds(part))) for part in PARTS}
        self.journal = Journal(options.journal, {} if options.journal is None else self._identity())
        self.model, self.round = job.model, 0
        self.ratio = dict.fromkeys(PARTS, 0.0)

    def run(self) -> PrunedViT:
        step, now = self.options.step, self._measure("start", 0.0, self.model)
        dense, planned = now.accuracy, dict[str, Callable[[float], Plan | None]]()
        while not self.job.budget.met(self.model.spec):
            if step < self.options.min_step:
                raise BudgetError(
                    f"{self.first.name}: expected at most {self.first.most:,.6g}, but the search came to "
                    f"{self.first.cost(self.model.spec):,.6g} at {now.accuracy:.2%} (dense {dense:.2%}) and can go no "
                    f"further within tau {self.options.tau:.2%} a round: allow a larger tau, finetune_epochs, "
                    "or less min_kept, max_pruning_ratio or ignored_layers"
                )
            bound = (now.accuracy if self.options.against == "round" else dense) - self.options.tau
            planned = planned or {part: self._planner(part) for part in PARTS}
            found = [best for part in PARTS if (best := self._largest(part, step, bound, planned[part])) is not None]
            if not found:
                step /= 2
                self.round += 1
                continue  # the model is the same, and so are its scores
            best = max(found, key=lambda probe: (now.cost - probe.cost) / max(now.accuracy - probe.accuracy, 1e-4))
            now, planned = self._commit(best, planned[best.part]), {}
        if self.model is self.job.model:  # nothing had to go: the result is another model all the same, and has a plan
            return compact(self.model, Plan.keep_all(self.model.spec))
        return self.model

    def _largest(self, part: str, step: float, bound: float, plan_of: Callable[[float], Plan | None]) -> Probe | None:
        """The largest ratio found that holds, by bisection between what is and one step further."""
        low, high = self.ratio[part], min(1.0, self.ratio[part] + step)
        while (plan := plan_of(high)) is None:  # not a unit of this part goes at so small a step
            if high == 1.0:
                return None
            low, high = high, min(1.0, high + step)
        probe = self._measure(part, high, plan)
        if probe.accuracy >= bound:
            return probe
        held, refused = None, plan
        for _ in range(self.options.probes):
            ratio = (low + high) / 2
            plan = plan_of(ratio)
            if plan == refused:
                high = ratio
            elif plan is None:
                low = ratio
            elif (probe := self._measure(part, ratio, plan)).accuracy >= bound:
                held, low = probe, ratio
            else:
                refused, high = plan, ratio
        return held

    def _planner(self, part: str) -> Callable[[float], Plan | None]:
        """From a share of the given model's units to a plan of the present one; scores are computed once."""
        spec, groups = self.model.spec, groups_of(self.model.spec, self.kinds[part])
        if not groups:
            return lambda ratio: None
        ranking = replace(self.job.budget.ranking, groups=self.kinds[part], pruning_ratio=None)
        with evaluating(self.model):
            scores = self.scorer.score(self.model, groups, self.job.data, self.job.seed)
        first = replace(self.job, model=self.model).first(groups)

        def plan_of(ratio: float) -> Plan | None:
            plan = Budget(ranking=replace(ranking, pruning_ratio=ratio)).plan(spec, scores, first)
            if plan == Plan.keep_all(spec):
                return None
            if self.job.budget.met(plan.spec()):
                # far enough: no further than the budget asks
                return Budget(self.job.budget.limits, ranking).plan(spec, scores, first)
            return plan

        return plan_of

    def _commit(self, probe: Probe, plan_of: Callable[[float], Plan | None]) -> Probe:
        plan = plan_of(probe.ratio)
        assert plan is not None
        self.model = compact(self.model, plan)
        self.ratio[probe.part] = probe.ratio
        self.journal.add(replace(probe, committed=True))
        if self.options.finetune_epochs:
            path, epochs = self.journal.path, self.options.finetune_epochs
            path = None if path is None else path.with_name(f"{path.name}.round{self.round}")
            recover_for(self.job, self.model, self.options.recipe, epochs=epochs, state=path)
        self.round += 1
        return self._measure("start", 0.0, self.model)

    def _measure(self, part: str, ratio: float, what: Plan | PrunedViT) -> Probe:
        plan, spec = (what, what.spec()) if isinstance(what, Plan) else (Plan.of(what), what.spec)
        name = hashlib.sha256(json.dumps(plan.to_dict()).encode()).hexdigest()[:16]
        share = self.first.cost(spec) / self.first.dense
        probe = self.journal.find(self.round, part, ratio, name)
        if probe is None:
            model = compact(self.model, plan) if isinstance(what, Plan) else what
            assert self.job.validation is not None
            right = accuracy(model, self.job.validation)
            probe = Probe(self.round, part, ratio, self._gone(part, spec), right, share, name)
            self.journal.add(probe)
        probe = replace(probe, cost=share)  # a table of latency may have been measured anew
        if self.options.on_probe is not None:
            self.options.on_probe(probe)
        return probe

    def _gone(self, part: str, spec: ViTSpec) -> float:
        """The share of the given model's units of a part that a spec lacks."""
        assert self.job.given is not None
        kinds = self.kinds.get(part, ())
        have, had = (sum(group.size for group in groups_of(of, kinds)) for of in (spec, self.job.given.spec))
        return 1 - have / had if had else 0.0

    def _identity(self) -> dict[str, Any]:
        options = self.options
        # of a scorer's own options the plans tell, of which a journal has hashes
        scorer = options.scorer if isinstance(options.scorer, str) else type(options.scorer).__name__
        assert self.job.validation is not None
        identity = {
            "search": "auto",
            "cost": self.first.name,
            "limits": {limit.name: limit.most for limit in self.job.budget.limits},
            "scorer": scorer,
            "tau": options.tau,
            "step": options.step,
            "min_step": options.min_step,
            "probes": options.probes,
            "against": options.against,
            "kinds": {part: list(kinds) for part, kinds in self.kinds.items()},
            "finetune_epochs": options.finetune_epochs,
            "recipe": dict(options.recipe),
            "ranking": asdict(self.job.budget.ranking),
            "seed": self.job.seed,
            "model": fingerprint(self.job.model),
            "validation": _images_and_labels(self.job.validation, self.job.model),
        }
        return json.loads(json.dumps(identity))  # type: ignore[no-any-return]  # tuples are lists in a journal


def _images_and_labels(data: Batches, model: PrunedViT) -> str:
    """How many there are, and a hash of them, whatever their order."""
    count = total = 0
    for batch in data:
        images, labels = (part.cpu().contiguous() for part in read_batch(batch, model, "auto") if part is not None)
        for image, label in zip(images, labels):
            one = hashlib.sha256(image.flatten().view(torch.uint8).numpy())
            one.update(str(label.tolist()).encode())
            total += int.from_bytes(one.digest())
            count += 1
    return f"{count} images, {total % 2**64:016x}"
