"""Recipe: how a pruned model is trained again, and what it learns from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import torch
from timm.data import Mixup
from torch import Tensor, nn
from torch.nn import functional as F

from .._options import check_types
from ..errors import PruningError, expect
from .plan import Plan

Distillation = Literal["hard", "soft", "feature"]
Schedule = Literal["cosine", "poly", "step"]

# of timm's own, step would first decay after 90 epochs, and poly, a tenth root, end at most of where it began
SCHEDULES: dict[Schedule, dict[str, float]] = {"cosine": {}, "poly": {"decay_rate": 1.0}, "step": {"decay_rate": 0.1}}


@dataclass(frozen=True)
class Recipe:
    """Options of :func:`recover`, with timm's names where timm has them.

    ``lr`` is that of the whole batch (no scaling by batch size). ``distillation`` matters where there is a teacher:
    ``hard`` learns its class, ``soft`` its probabilities at ``temperature``, ``feature`` also its pooled features;
    ``alpha`` is its share of the loss. ``accumulate`` batches make one step. ``ema_decay`` keeps a moving average,
    which the model ends with. ``amp`` None means on CUDA only. ``max_steps`` ends training early, the schedule with it.
    ``sched`` is ``cosine``, ``poly`` (linear) or ``step`` (a tenth after each third of the training). ``mixup`` and
    ``cutmix`` take labels that are whole numbers; of an odd number of images the last stays as it is.
    """

    epochs: int = 10
    lr: float = 5e-4
    opt: str = "adamw"
    weight_decay: float = 0.05
    sched: Schedule = "cosine"
    warmup_epochs: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-6
    clip_grad: float | None = None
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    distillation: Distillation = "soft"
    alpha: float = 0.5
    temperature: float = 1.0
    accumulate: int = 1
    ema_decay: float | None = None
    amp: bool | None = None
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    max_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        for name, value in vars(self).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            expect(finite, PruningError, f"a finite {name}", got=value)
        for name in ("epochs", "accumulate", "lr", "temperature", "clip_grad", "max_steps"):
            value = getattr(self, name)
            expect(value is None or value > 0, PruningError, f"{name} above 0", got=value)
        for name in ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "mixup", "cutmix", "seed"):
            expect(getattr(self, name) >= 0, PruningError, f"{name} of at least 0", got=getattr(self, name))
        for name in ("alpha", "smoothing"):
            expect(0 <= getattr(self, name) <= 1, PruningError, f"{name} between 0 and 1", got=getattr(self, name))
        if self.ema_decay is not None:
            expect(0 < self.ema_decay < 1, PruningError, "ema_decay between 0 and 1", got=self.ema_decay)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(known))
        expect(not unknown, PruningError, f"options of recover out of {', '.join(known)}", got=", ".join(unknown))
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Mixing:
    """timm's mixup and cutmix. The images and labels given are left as they are."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.classes: Any = getattr(model, "num_classes", None)
        expect(type(self.classes) is int, PruningError, "a model with num_classes, to mix labels", got=self.classes)
        # smoothing is the loss's, for mixed and plain labels alike
        self.mix: Any = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=self.classes)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """images [B, C, H, W], labels [B] -> mixed images, and labels [B, num_classes]."""
        expect(not labels.is_floating_point(), PruningError, "labels of whole numbers, to mix", got=labels.dtype)
        images, target = images.clone(), F.one_hot(labels, self.classes).float()
        if even := len(images) // 2 * 2:
            images[:even], target[:even] = self.mix(images[:even], labels[:even])
        return images, target


class Student(nn.Module):
    """A model that also gives its pooled features: one forward call, so that torchrun's wrapper sees all of it."""

    def __init__(self, model: nn.Module, features: bool) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, images: Tensor) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None]:
        if not self.features:
            return self.model(images), None
        model: Any = self.model
        tokens = model.forward_features(images)
        return model.forward_head(tokens), model.forward_head(tokens, pre_logits=True)


class Loss:
    """Cross entropy with the labels, and what the teacher adds."""

    def __init__(self, recipe: Recipe, student: nn.Module, teacher: nn.Module | None) -> None:
        self.recipe, self.teacher = (
            recipe,
            None if teacher is None else Student(teacher, self.features(recipe, teacher)),
        )
        taught, own = (getattr(m, "num_classes", None) for m in (teacher, student))
        fits = None in (taught, own) or taught == own
        expect(fits, PruningError, f"a teacher of {own} classes, as the model has", got=taught)
        self.channels: Tensor | None = None
        if teacher is not None and recipe.distillation == "feature":
            width, own = (getattr(m, "num_features", None) for m in (teacher, student))
            if width != own:
                (dense, had), (of, kept) = (_channels(m, size) for m, size in ((teacher, width), (student, own)))
                fits = dense == of and (len(had), len(kept)) == (width, own) and set(kept) <= set(had)
                expect(
                    fits, PruningError, f"feature distillation from a teacher of width {own} or of the plan", got=width
                )
                self.channels = torch.tensor([had.index(channel) for channel in kept])

    @staticmethod
    def features(recipe: Recipe, teacher: nn.Module | None) -> bool:
        return teacher is not None and recipe.distillation == "feature"

    def __call__(
        self, output: tuple[Tensor | tuple[Tensor, Tensor], Tensor | None], images: Tensor, target: Tensor
    ) -> Tensor:
        logits, features = output
        # a distilled model in training gives a pair: one head learns from the labels, the other from the teacher
        to_label, to_teacher = logits if isinstance(logits, tuple) else (logits, logits)
        loss = F.cross_entropy(to_label.float(), target, label_smoothing=self.recipe.smoothing)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            taught, seen = self.teacher(images.to(next(self.teacher.parameters()).dtype))
        alpha, t = self.recipe.alpha, self.recipe.temperature
        if self.recipe.distillation == "hard":
            lesson = F.cross_entropy(to_teacher.float(), taught.argmax(-1))
        else:
            p, q = (x.float().div(t).log_softmax(-1) for x in (to_teacher, taught))
            lesson = F.kl_div(p, q, reduction="batchmean", log_target=True) * t * t
        if features is not None:
            seen = seen if self.channels is None else seen[..., self.channels.to(seen.device)]
            lesson = lesson + (features - seen).float().square().mean() / seen.float().square().mean().clamp_min(1e-12)
        return (1 - alpha) * loss + alpha * lesson


def _channels(model: nn.Module, width: int | None) -> tuple[int, Sequence[int]]:
    """The width of the first dense model, and which of its channels a model's features have."""
    plan = getattr(model, "plan", None)
    if plan is None:
        return width or 0, range(width or 0)
    read = Plan.from_dict(plan)
    return read.dense.embed_dim, read.channels
