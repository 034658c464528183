"""What a pruning method is, what it is given, and how it looks at images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import tee
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import PruningError, expect
from ..models import PrunedViT
from .budget import Budget
from .groups import KINDS, Group, Kind, Scores, groups_of
from .plan import Plan, origins
from .ranking import Ranking
from .surgery import compact

if TYPE_CHECKING:
    from .recover import Step

Data: TypeAlias = Iterable[Tensor | Sequence[Tensor]]
"""Batches of (images, labels), or of images alone where no label is needed."""

Batches: TypeAlias = Iterable[Sequence[Tensor]]
"""Batches of (images, labels), again and again."""


def expect_again(**batches: Batches | None) -> None:
    """Raise :class:`PruningError` for an iterator: a second time there would be nothing to see."""
    for name, given in batches.items():
        what = f"{name}= of batches to go through again and again, such as a list or a DataLoader"
        expect(not isinstance(given, Iterator), PruningError, what, got=type(given).__name__)


class Replayed:
    """An iterator's batches, to go through again and again. Keeps those that were looked at, and draws no others."""

    def __init__(self, batches: Iterator[Any]) -> None:
        (self.start,) = tee(batches, 1)

    def __iter__(self) -> Iterator[Any]:
        self.start, again = tee(self.start)
        return again


@dataclass(frozen=True)
class Job:
    """One pruning: the model (left as it is), how much goes, what to measure on, and the seed of all chance.

    ``data`` is for scores; ``train`` for methods that train, ``validation`` for those that look at accuracy. A recipe's
    own seed goes before ``seed``. ``on_step`` is called with each training step, whichever training it is of. ``given``
    is the model that ratios count from, where ``model`` is what earlier methods or rounds left of it.
    """

    model: PrunedViT
    budget: Budget
    data: Data | None = None
    seed: int = 0
    train: Batches | None = None
    validation: Batches | None = None
    on_step: Callable[[Step], None] | None = None
    given: PrunedViT | None = None

    def __post_init__(self) -> None:
        if self.given is None:
            object.__setattr__(self, "given", self.model)

    def plan(self, scores: Scores) -> Plan:
        """The plan that the budget and the scores make."""
        return self.budget.plan(self.model.spec, scores, self.first(scores))

    def first(self, groups: Iterable[Group]) -> dict[Group, Group]:
        """Each group of the model as it was in the given one; none where that is the model itself."""
        if self.given is None or self.given is self.model:
            return {}
        return origins(Plan.of(self.given), Plan.of(self.model), groups)

    def training_data(self, of: str) -> Batches:
        """``train``, for what ``of`` says. Raises :class:`PruningError` where there is none."""
        if self.train is None:
            raise PruningError(f"{of}: expected train=batches of (images, labels), got none")
        return self.train


class Method(ABC):
    """A way to prune. Options are the fields of a frozen dataclass; ``groups`` are the kinds pruned by default.

    ``supports`` are the kinds that can be asked for, ``heeds`` the fields of :class:`Ranking` that the method goes by.
    One that ``drops_tokens`` prunes a model once.
    """

    groups: ClassVar[tuple[Kind, ...]] = ("qk", "v", "mlp")
    supports: ClassVar[tuple[Kind, ...]] = KINDS
    heeds: ClassVar[tuple[str, ...]] = tuple(field.name for field in fields(Ranking))
    drops_tokens: ClassVar[bool] = False

    def expect_fits(self, job: Job) -> None:  # noqa: B027 (most methods refuse nothing)
        """Raise :class:`PruningError` for what the method cannot do: asked of all methods before the first one runs."""

    @abstractmethod
    def prune(self, job: Job) -> PrunedViT:
        """The compact model, with its plan."""


class Scorer(Method):
    """A method that gives each unit a score; the lowest go."""

    @abstractmethod
    def score(self, model: PrunedViT, groups: Sequence[Group], data: Data | None, seed: int) -> dict[Group, Tensor]:
        """A score for each unit of each group, on the CPU or the model's device."""

    def expect_fits(self, job: Job) -> None:
        self.expect_supported(job.budget.kinds(job.model.spec, self.groups))

    def prune(self, job: Job) -> PrunedViT:
        spec = job.model.spec
        groups = groups_of(spec, job.budget.kinds(spec, self.groups))
        with evaluating(job.model):
            scores = self.score(job.model, groups, job.data, job.seed)
        return compact(job.model, job.plan(scores))

    def expect_supported(self, kinds: Sequence[Kind]) -> None:
        name, others = type(self).__name__.lower(), [kind for kind in kinds if kind not in self.supports]
        what = f"groups that {name} scores, {', '.join(self.supports)} (for others combine it with another method)"
        expect(not others, PruningError, what, got=", ".join(others))


@contextmanager
def keeping_modes(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, each module is in training or evaluation mode afterwards as before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode inside, and as before outside."""
    with keeping_modes(model):
        model.eval()
        yield


def images_of(data: Data | None, model: nn.Module, most: int | None, *, of: str) -> Iterator[Tensor]:
    """Batches of images, at most ``most`` images in all, where the model is."""
    for images, _ in _batches(data, model, most, of, labels=False):
        yield images


def labelled(data: Data | None, model: nn.Module, most: int | None, *, of: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, with labels."""
    for images, labels in _batches(data, model, most, of, labels=True):
        assert labels is not None
        yield images, labels


def read_batch(batch: Any, model: nn.Module, of: str, *, labels: bool = True) -> tuple[Tensor, Tensor | None]:
    """Images [B, C, H, W] and labels, [B] or [B, num_classes], of a batch, where the model is and images in its dtype.

    None in place of the labels where ``labels`` are not looked at. Raises :class:`PruningError` for a batch that is not
    of the model's size and classes, and where labels are of no use: no logits, or some for each token.
    """
    parts = [batch] if isinstance(batch, Tensor) else batch
    pair = isinstance(parts, list | tuple) and len(parts) > 0 and all(isinstance(part, Tensor) for part in parts[:2])
    expect(pair, PruningError, f"{of} to get batches of (images, labels)", got=type(batch).__name__)
    images: Tensor = parts[0]
    spec: Any = getattr(model, "spec", None)
    size = None if spec is None or spec.dynamic_img_size else (spec.in_chans, *spec.img_size)
    fits = images.dim() == 4 and size in (None, tuple(images.shape[1:]))
    what = "[B, C, H, W]" if size is None else f"[B, {', '.join(map(str, size))}]"
    expect(fits, PruningError, f"{of} to get images {what}", got=list(images.shape))
    parts = [part.clone() if part.is_inference() else part for part in parts[:2]]  # autograd would refuse them
    like = next(model.parameters())
    images = parts[0].to(like.device, like.dtype)
    if not labels:
        return images, None
    has_logits = getattr(model, "num_classes", None) != 0 and getattr(model, "global_pool", None) != ""
    what = f"{of} to get a model with a classifier and a pooling, which labels can be about (reset_classifier)"
    expect(has_logits, PruningError, what, got="num_classes 0 or global_pool ''")
    if len(parts) < 2:
        raise PruningError(f"{of}: expected batches of (images, labels), got images alone")
    classes = getattr(model, "num_classes", None) or 2**31
    if parts[1].is_floating_point():
        fits = tuple(parts[1].shape) == (len(images), classes)
    else:
        fits = tuple(parts[1].shape) == (len(images),) and bool(((parts[1] >= 0) & (parts[1] < classes)).all())
    what = f"{of} to get an integer from 0 to {classes - 1} as the label of each of {len(images)} images"
    expect(fits, PruningError, what, got=f"{parts[1].dtype} {list(parts[1].shape)} with {_extremes(parts[1])}")
    return images, parts[1].to(like.device, torch.float32 if parts[1].is_floating_point() else torch.int64)


def _extremes(values: Tensor) -> str:
    return f"{values.min().item():g} to {values.max().item():g}" if values.numel() else "none"


def _batches(
    data: Data | None, model: nn.Module, most: int | None, of: str, *, labels: bool
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if data is None:
        raise PruningError(
            f"expected images that {of} can measure on (--data DIR or digits; data=batches in Python), got none"
        )
    seen = 0
    for batch in data:
        images, target = read_batch(batch, model, of, labels=labels)
        rest = len(images) if most is None else most - seen
        if rest <= 0:
            break
        seen += len(images[:rest])
        images = images[:rest]
        expect(bool(images.isfinite().all()), PruningError, f"{of} to get finite images", got="NaN or infinity")
        yield images, None if target is None else target[:rest]
        if seen == most:
            break  # another batch would be read to be left
    expect(seen > 0, PruningError, f"{of} to get at least one image", got="none")


@contextmanager
def watched_qkv(model: PrunedViT) -> Iterator[dict[int, Tensor]]:
    """Inside, each forward pass leaves the output of every ``attn.qkv`` [B, N, rows], by block."""
    seen: dict[int, Tensor] = {}
    handles = []
    for i, block in enumerate(model.blocks):
        if model.spec.blocks[i].qk_dims:

            def keep(module: nn.Module, inputs: Any, output: Tensor, i: int = i) -> None:
                seen[i] = output

            handles.append(block.get_submodule("attn.qkv").register_forward_hook(keep))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def reduce_square(weight: Tensor, axis: int) -> Tensor:
    """Σ w² over all axes but one."""
    others = [a for a in range(weight.dim()) if a != axis]
    return weight.detach().double().square().sum(others) if others else weight.detach().double().square()
