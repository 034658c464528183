"""prune(): a model, a method and a budget in; a compact, trainable model out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeAlias

from torch import nn

from .. import shapes
from ..errors import PruningError, expect
from ..models import PrunedViT
from ..spec import ViTSpec
from .budget import Budget, Constraints, Cost
from .magnitude import Magnitude
from .method import Data, Job, Method
from .random import Random
from .ranking import Ranking
from .surgery import as_pruned
from .taylor import Taylor

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "random": Random,
    "taylor": Taylor,
}

AnyMethod: TypeAlias = str | Method

_RANKING = {field.name for field in fields(Ranking)}


def prune(
    model: nn.Module,
    method: AnyMethod = "magnitude",
    constraints: Constraints | None = None,
    data: Data | None = None,
    *,
    cost: Cost | Mapping[str, Cost] | None = None,
    seed: int = 0,
    shape: ViTSpec | str | None = None,
    **options: Any,
) -> PrunedViT:
    """Prune a timm ViT or a PrunedViT; ``model`` is left as it is.

    ``constraints`` say what remains of the given model: ``{"macs": "45%"}``, ``{"params": 10e6, "macs": 2.0e9}``; names
    other than macs and params need ``cost``, what a spec costs in that unit (a callable, or one by name). ``shape``
    instead asks for exactly the widths of a spec, or of a published shape by name. ``options`` are the fields of
    :class:`Ranking` and of the method. The result has its ``plan`` set.

    Raises :class:`BudgetError` where a constraint cannot be met, :class:`PruningError` for anything else that does not
    fit, :class:`UnsupportedModel` for a model that no spec describes.
    """
    ranking = Ranking(**{name: value for name, value in options.items() if name in _RANKING})
    chosen = named_method(method, {name: value for name, value in options.items() if name not in _RANKING})
    dense = as_pruned(model)
    target = shapes.get(shape) if isinstance(shape, str) else shape
    budget = Budget.of(dense.spec, constraints, cost, ranking, target)
    small = chosen.prune(Job(dense, budget, data, seed))
    earlier = dense.provenance.get("method")
    name = method if isinstance(method, str) else type(method).__name__.lower()
    small.provenance |= {
        "method": f"{earlier}+{name}" if earlier else name,
        "constraints": {key: str(value) for key, value in (constraints or {}).items()},
        "seed": seed,
    }
    return small


def named_method(method: AnyMethod, options: Mapping[str, Any]) -> Method:
    """A method by its name, with its options; errors list the names that there are."""
    if isinstance(method, Method):
        expect(not options, PruningError, "options inside the given method", got=sorted(options))
        return method
    expect(method in METHODS, PruningError, f"a method out of {', '.join(sorted(METHODS))}", got=repr(method))
    kind: Any = METHODS[method]
    known = {field.name for field in fields(kind)}
    unknown = sorted(set(options) - known)
    what = f"options of {method} out of {', '.join(sorted(known | _RANKING))}"
    expect(not unknown, PruningError, what, got=", ".join(unknown))
    built: Method = kind(**options)
    return built
