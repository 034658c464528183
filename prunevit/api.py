"""The facade: what ``import prunevit`` gives. It brings pruning, runtime and latency together."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, pruning
from ._atomic import expect_replaceable
from .errors import BudgetError, CheckpointError, InputError, PruningError, RuntimeMismatch, expect
from .latency import Deployment, LatencyMiss, Measured
from .latency.table import OnNode
from .models.from_timm import as_pruned
from .models.tensors import check_state
from .models.vit import PrunedViT
from .nn import KernelModule, restore
from .pruning import Budget
from .pruning.budget import Constraints, Cost, costs_by_name, mappings_of
from .pruning.journal import journal_of
from .pruning.method import Batches, Data, Replayed, evaluating
from .pruning.prune import DEFAULT_METHOD, AnyMethod
from .runtime import Runtime
from .runtime.agreement import TOLERANCE, largest_error
from .spec import ViTSpec

GATE_TOLERANCE = TOLERANCE


@torch.inference_mode(False)  # whoever calls in inference mode gets weights that can be trained
def prune(
    model: nn.Module,
    method: AnyMethod | Sequence[AnyMethod] = DEFAULT_METHOD,
    constraints: Constraints | Sequence[Constraints] | None = None,
    data: Data | None = None,
    *,
    on: Deployment | Mapping[str, Any] | None = None,
    cost: Cost | Mapping[str, Cost] | None = None,
    train: Batches | None = None,
    validation: Batches | None = None,
    seed: int = 0,
    on_timing: OnNode | None = None,
    **options: Any,
) -> PrunedViT:
    """Prune a timm ViT (or prune a pruned one further) to a budget; the result is a trainable module of its own shape.

    ``method``: a name of :data:`prunevit.pruning.METHODS` or a :class:`Method`; or several, applied one after another,
    each with the kinds of group that it prunes: ``["snp", "taylor:head", "taylor:sublayer"]``. Papers and our reading
    of them: ``docs/methods.md``, and each method's docstring.

    ``constraints``: what remains at most, as a share of the given model or a number with a unit; several all hold, and
    a list has one mapping for each method.

    - ``macs``, ``params``: ``"45%"``, ``2.0e9``, ``"2.0G"``, ``"10M"``; MACs of one image, QKᵀ and AV included.
    - ``latency``: ``"60%"``, ``"20ms"``; milliseconds a call (also of a number without a unit) of the runtime on
      ``on``, a :class:`Deployment` or its fields (``{"device": "cpu", "batch": 8, "threads": 2}``): from a table of
      step times, checked on the whole model. The figures are in ``provenance["latency"]``.
    - ``memory``: ``"50%"``, ``"50MB"``; bytes of all parameters and of the runtime's buffers on ``on``.
    - any other name, in a unit of your own: ``cost``, a callable that takes a :class:`ViTSpec`, or one by name.

    ``data``: batches of (images, labels), or of images where no label is needed, that scores are measured on; methods
    that look at weights alone need none. ``train``: batches for methods that train (``gohsp`` with ``stages``,
    ``finetune_epochs``, ``recovery``), with a length. ``validation``: held-out batches for ``auto``; no test images.

    ``options``: ``shape`` (exactly the widths of a spec or published shape), ``rounds`` and ``recovery`` (iterative
    pruning), ``on_step`` (called with each training step), the fields of :class:`prunevit.pruning.Ranking`
    (``groups``, ``isomorphic``, ``pruning_ratio``, ``ignored_layers``, …) and those of the method. ``on_timing`` is
    called with how many steps have been timed and how many are wanted.

    ``model`` is left as it is; the result's ``plan`` says which indices of the dense model were kept.

    Raises :class:`UnsupportedModel` for a model that no spec describes; :class:`BudgetError` where a constraint cannot
    be met, with the floor that can, and :class:`LatencyMiss`, one of them, where table and whole model disagree;
    :class:`PruningError` for anything else that does not fit; :class:`CheckpointError` for a file of another run.
    """
    if isinstance(data, Iterator):
        data = Replayed(data)  # scores of several methods, or attempts, look at the images several times
    source = as_pruned(model)
    every = mappings_of(constraints)
    last = every[-1]
    named = {name for mapping in every for name in mapping}
    costs = costs_by_name(named, cost)
    wanted = {"latency", "memory"} & (named - set(costs))
    expect(on is None or bool(wanted), PruningError, "on= with a latency or memory constraint", got=sorted(named))
    given: dict[str, Any] = {"train": train, "validation": validation, "seed": seed, **options}
    if not wanted:
        return pruning.prune(source, method, constraints, data, cost=costs, **given)
    deployment = Deployment.of(on)
    if "memory" in wanted:
        costs["memory"] = deployment.memory
    if "latency" not in wanted:
        return pruning.prune(source, method, constraints, data, cost=costs, **given)
    measured = costs["latency"] = Measured(source, deployment, on_timing)
    if "latency" not in last:
        raise PruningError(f"expected latency in the last constraints, where it can be checked, got {dict(last)}")
    (limit,) = Budget.of(source.spec, {"latency": last["latency"]}, {"latency": measured}).limits
    measured.aim(limit.most)

    def attempt(number: int) -> PrunedViT:
        own = {"journal": journal_of(options["journal"], attempt=number + 1)} if options.get("journal") else {}
        return pruning.prune(source, method, constraints, data, cost=costs, **{**given, **own})

    try:
        return measured.within(limit.most, attempt, deployment.attempts or (3 if train is None else 1))
    except BudgetError as error:
        if isinstance(error, LatencyMiss) or not str(error).startswith("latency:"):
            raise
        raise BudgetError(f"{error}; {measured.source}") from None


def save(model: PrunedViT, path: str | os.PathLike[str], *, check: bool = True) -> Path:
    """Write a checkpoint directory: atomically, and only if the runtime computes what the module computes.

    ``check=False`` leaves the comparison out. Raises :class:`InputError` for anything but a PrunedViT,
    :class:`CheckpointError` for weights that no checkpoint holds or that give no finite outputs,
    :class:`UnsupportedModel` for modules that are not those of the spec, which a checkpoint would not bring back,
    :class:`RuntimeMismatch`.
    """
    _expect_pruned(model)
    expect_replaceable(path)
    check_state(model.spec, model.state_dict(), "model")  # before the runtime is blamed for what it cannot compute
    as_pruned(model)
    if check:
        gate(model)
    return checkpoint.save(model, path)


def load(path: str | os.PathLike[str]) -> PrunedViT:
    """Read a checkpoint directory as a trainable module. Raises :class:`CheckpointError`, :class:`SpecError`."""
    return checkpoint.load(path)


def gate(model: PrunedViT, batch: int = 2) -> float:
    """The largest difference between a module and its runtime on random images, as a share of the logits' spread.

    A module in 16 bits is compared in fp32, on the numbers that its weights have, and an accelerated one as the eager
    one that it was. Raises :class:`RuntimeMismatch` above :data:`GATE_TOLERANCE`, :class:`CheckpointError` for a module
    whose outputs are no numbers, :class:`UnsupportedModel`.
    """
    _expect_pruned(model)
    spec: ViTSpec = model.spec
    chance = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(batch, spec.in_chans, *spec.img_size, generator=chance, dtype=torch.float32, device="cpu")
    first = next(model.parameters())
    half = first.dtype in (torch.float16, torch.bfloat16)
    # on the CPU, as the runtime: a GPU's products may be in TF32. On kernels, these would be compared with themselves.
    on_kernels = any(isinstance(module, KernelModule) for module in model.modules())
    single = restore(copy.deepcopy(model)).cpu() if half or on_kernels or first.device.type != "cpu" else model
    single = single.float() if half else single
    dtype = next(single.parameters()).dtype
    with evaluating(single), torch.no_grad(), torch.autocast("cpu", enabled=False):
        expected = single(images.to(dtype)).float()
    finite = bool(expected.isfinite().all())
    what = "a model whose outputs on random images are numbers (one that diverged is recovered at a lower lr)"
    expect(finite, CheckpointError, what, got="infinities or NaN")
    got = Runtime(model, device="cpu", dtype=torch.float32)(images)
    error = largest_error(got, expected)
    if not error <= GATE_TOLERANCE:
        raise RuntimeMismatch(
            f"expected the runtime within {GATE_TOLERANCE:g} of the module's outputs, got {error:.3g}: "
            "nothing was written. Please report this with the spec (save with check=False to keep the weights)."
        )
    return error


def _expect_pruned(model: object) -> None:
    got = type(model).__name__
    expect(isinstance(model, PrunedViT), InputError, "a PrunedViT (prunevit.from_timm makes one)", got=got)


__all__ = ["GATE_TOLERANCE", "Deployment", "Runtime", "gate", "load", "prune", "save"]
