"""prune(): a model, a method and a budget in; a compact, trainable model out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import shapes
from .._options import check_types
from ..errors import PruningError, expect
from ..models import PrunedViT
from ..models.from_timm import as_pruned
from ..spec import ViTSpec
from .auto import Auto
from .budget import Budget, Constraints, Cost, mappings_of
from .combine import Sequential, Stage
from .cp_vit import CPViT, EViT
from .groups import KINDS, check_kinds
from .method import Batches, Data, Job, Method, Replayed, expect_again
from .plan import Plan
from .provenance import with_pruning
from .ranking import Ranking
from .recipe import Recipe
from .recover import Step
from .scorers import SCORERS

logger = logging.getLogger("prunevit")

METHODS: dict[str, type[Method]] = {**SCORERS, "auto": Auto, "cp-vit": CPViT, "evit": EViT}
DEFAULT_METHOD = "snp"

AnyMethod: TypeAlias = str | Method

_RANKING = [field.name for field in fields(Ranking)]


@torch.inference_mode(False)  # whoever calls in inference mode gets weights that can be trained
def prune(
    model: nn.Module,
    method: AnyMethod | Sequence[AnyMethod] = DEFAULT_METHOD,
    constraints: Constraints | Sequence[Constraints] | None = None,
    data: Data | None = None,
    *,
    cost: Cost | Mapping[str, Cost] | None = None,
    seed: int = 0,
    shape: ViTSpec | str | None = None,
    train: Batches | None = None,
    validation: Batches | None = None,
    rounds: int = 1,
    recovery: Mapping[str, Any] | None = None,
    on_step: Callable[[Step], None] | None = None,
    **options: Any,
) -> PrunedViT:
    """Prune a timm ViT or a PrunedViT; ``model`` is left as it is.

    ``constraints`` say what remains of the given model: ``{"macs": "45%"}``, ``{"params": 10e6, "macs": 2.0e9}``; names
    other than macs and params need ``cost``, what a spec costs in that unit (a callable, or one by name). ``shape``
    instead asks for exactly the widths of a spec, or of a published shape by name. ``options`` are the fields of
    :class:`Ranking` and of the method.

    Several methods are applied one after another, each to its share of the way or to constraints of its own where
    there is one mapping for each; ``"taylor:head,mlp"`` is a method with the kinds of group that it prunes. ``rounds``
    prunes in as many rounds, with ``recovery`` (options of :func:`recover`, on ``train``) after each pruning.
    ``data`` is for scores, ``train`` for methods that train, ``validation`` for those that look at accuracy.
    ``on_step`` is called with each training step.

    The result has its ``plan`` set, and what was asked for in its ``provenance``, after the prunings before. Raises
    :class:`BudgetError` where a constraint cannot be met, :class:`PruningError` for anything else that does not fit,
    :class:`UnsupportedModel` for a model that no spec describes.
    """
    expect(type(seed) is int and seed >= 0, PruningError, "a seed of at least 0", got=repr(seed))
    about_ranks = {name: value for name, value in options.items() if name in _RANKING}
    check_types(Ranking, about_ranks)
    ranking = Ranking(**about_ranks)
    methods: list[Any] = list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    expect(bool(methods), PruningError, "at least one method", got="none")
    for one in methods:
        expect(isinstance(one, str | Method), PruningError, f"a method out of {', '.join(METHODS)}", got=repr(one))
    expect(type(rounds) is int and rounds >= 1, PruningError, "at least one round", got=repr(rounds))
    fits = recovery is None or isinstance(recovery, Mapping)
    expect(fits, PruningError, 'recovery such as {"epochs": 1}, options of recover', got=repr(recovery))
    Recipe.of(recovery or {})
    fits = data is None or (isinstance(data, Iterable) and not isinstance(data, Tensor | str | Mapping))
    expect(fits, PruningError, "data= of batches, such as a DataLoader", got=type(data).__name__)
    expect_again(train=train, validation=validation)
    stages = _stages(methods, {name: value for name, value in options.items() if name not in _RANKING})
    _expect_heeded(stages, ranking)
    dense = as_pruned(model)
    Plan.of(dense)  # refuses a model that its plan no longer describes, before anything is scored
    kinds = {kind for stage in stages for kind in stage.groups or ranking.groups or stage.method.groups}
    ranking.expect_patterns(dense.spec, kinds)
    for name, weight in dense.named_parameters():
        expect(bool(weight.isfinite().all()), PruningError, f"finite weights in {name}", got="NaN or infinity")
    if isinstance(shape, str):
        known = (*shapes.names(), *shapes.names(dense=True))
        expect(shape in known, PruningError, f"a spec, or a published shape out of {', '.join(known)}", got=repr(shape))
    target = shapes.get(shape) if isinstance(shape, str) else shape
    each = mappings_of(constraints)
    budget = Budget.of(dense.spec, each[-1], cost, ranking, target)
    if isinstance(constraints, Sequence):
        expect(rounds == 1, PruningError, "one mapping of constraints, which rounds share", got="a list")
        fits = len(each) == len(stages)
        expect(fits, PruningError, f"constraints for each of {len(stages)} methods", got=len(each))
        own = [Budget.of(dense.spec, mapping, cost, ranking).limits for mapping in each]
        stages = [replace(stage, limits=limits) for stage, limits in zip(stages, own)]
    # scores of several methods look at the images several times
    again = Replayed(data) if isinstance(data, Iterator) else data
    small = Sequential(stages, rounds, recovery).prune(Job(dense, budget, again, seed, train, validation, on_step))
    if not small.spec.num_classes and small.spec.embed_dim != dense.spec.embed_dim:
        what = "features are %d wide now, and were %d: groups without channel would leave them"
        logger.warning(what, small.spec.embed_dim, dense.spec.embed_dim)
    names = [one if isinstance(one, str) else type(one).__name__.lower() for one in methods]
    asked = {"method": method, "constraints": constraints or None, "seed": seed, "shape": shape, "recovery": recovery}
    asked |= {"rounds": rounds if rounds > 1 else None, **options}
    small.provenance = with_pruning(small.provenance, names, asked)
    return small


def _expect_heeded(stages: Sequence[Stage], ranking: Ranking) -> None:
    """Some method must go by each option of :class:`Ranking` that is asked for, and prune each kind of group."""
    every = [stage.method for stage in stages]
    heeded = [name for name in _RANKING if any(name in method.heeds for method in every)]
    for field in fields(Ranking):
        fits = field.name in heeded or getattr(ranking, field.name) in (field.default, [], {})
        what = f"an option of every method that {_named(every)} goes by, out of {', '.join(heeded)}"
        expect(fits, PruningError, what, got=field.name)
    asked = [([stage.method], stage.groups) for stage in stages if stage.groups is not None]
    asked += [([stage.method for stage in stages if stage.groups is None], ranking.groups or ())]
    for methods, kinds in asked:
        known = [kind for kind in KINDS if any(kind in method.supports for method in methods)]
        what = f"kinds of group that {_named(methods)} prunes, {', '.join(known) or 'none'} (for others combine it)"
        what = what if methods else "groups= where a method does not name its own"
        expect(set(kinds) <= set(known), PruningError, what, got=", ".join(kinds))


def _named(methods: Sequence[Method]) -> str:
    names = {kind: name for name, kind in METHODS.items()}
    return " or ".join(names.get(type(method), type(method).__name__) for method in methods)


def named_method(name: str, options: Mapping[str, Any]) -> Method:
    """A method by its name, with its options; errors list the names that there are."""
    expect(name in METHODS, PruningError, f"a method out of {', '.join(sorted(METHODS))}", got=repr(name))
    kind: Any = METHODS[name]
    unknown = sorted(set(options) - _options(name))
    what = f"options of {name} out of {', '.join(sorted(_options(name) | set(_RANKING)))}"
    expect(not unknown, PruningError, what, got=", ".join(unknown))
    check_types(kind, options)
    method: Method = kind(**options)
    return method


def _options(name: str) -> set[str]:
    kind: Any = METHODS.get(name)
    return set() if kind is None else {field.name for field in fields(kind)}


def _stages(methods: Sequence[AnyMethod], options: Mapping[str, Any]) -> list[Stage]:
    """Each method with those of the options that are its own; each option must be somebody's."""
    names = [m.partition(":")[0] for m in methods if isinstance(m, str)]
    for name in names if len(methods) > 1 else ():
        named_method(name, {})
    strangers = sorted(set(options) - set[str]().union(*map(_options, names)))
    expect(len(methods) == 1 or not strangers, PruningError, f"options of {', '.join(names)}", got=", ".join(strangers))
    stages = []
    for method in methods:
        if isinstance(method, Method):
            expect(len(methods) > 1 or not options, PruningError, "options inside the method", got=sorted(options))
            stages.append(Stage(method))
            continue
        name, colon, kinds = method.partition(":")
        own = {key: value for key, value in options.items() if len(methods) == 1 or key in _options(name)}
        stages.append(Stage(named_method(name, own), check_kinds(kinds.split(",")) if colon else None))
    return stages
