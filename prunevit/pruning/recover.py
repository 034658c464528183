"""recover(): fine-tune a pruned model, or distil the dense one into it. timm's optimisers, schedulers and mixup."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CheckpointError, PruningError, expect
from .dealing import Dealer
from .method import Batches, Job, evaluating, expect_again, keeping_modes, read_batch
from .recipe import SCHEDULES, Loss, Mixing, Recipe, Student
from .training_state import fingerprint, read_facts, read_state, write_state

History: TypeAlias = list[dict[str, float]]


@dataclass(frozen=True)
class Step:
    """One optimiser step, for progress bars."""

    step: int  # from 1
    total: int
    epoch: int  # from 0
    loss: float
    lr: float


@torch.inference_mode(False)  # whoever calls in inference mode trains all the same
def recover(
    model: nn.Module,
    data: Batches,
    *,
    teacher: nn.Module | None = None,
    validation: Batches | None = None,
    state: str | os.PathLike[str] | None = None,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_epoch: Callable[[Mapping[str, float]], None] | None = None,
    **recipe: Any,
) -> History:
    """Train ``model`` in place on batches of (images, labels); returns loss, lr and accuracy of each epoch.

    ``data`` has a length. With a ``teacher`` (in evaluation mode, left as it is), ``distillation`` is added.
    ``validation`` is evaluated after each epoch. ``state`` names a file that the run writes after each epoch and
    resumes from, to exactly what an uninterrupted run would have come to: by the same recipe, from the same model as
    it was at the start, with the same teacher. ``penalty`` adds to the loss of each batch; ``on_step`` is called after
    each step, ``on_epoch`` after each epoch with what the history has of it. The others are the fields of
    :class:`Recipe`.

    Under ``torchrun`` gradients are averaged over the processes, and batches dealt out to them: a step is one batch of
    each. A plain ``DataLoader`` reads only its own process's images; any other iterable is gone through whole by every
    process, which trains on its own batches. A loader with a ``DistributedSampler`` is used as it is.

    Chance comes from the recipe's seed, the epoch and the process alone (a loader's own generators are seeded too, and
    its workers start anew); the caller's random state is left as it was. Raises :class:`PruningError` on options that
    do not exist, on a model that gives no logits and on a loss that is no number, :class:`CheckpointError` on a state
    of another run.
    """
    expect_again(validation=validation)
    run = _Run(model, data, teacher, validation, Recipe.of(recipe), None if state is None else Path(state))
    run.penalty, run.on_step, run.on_epoch = penalty, on_step, on_epoch
    with _own_chance(run.device), keeping_modes(model):
        if teacher is None:
            return run.train()
        with evaluating(teacher), _both_heads(model):
            return run.train()


def recover_for(job: Job, model: nn.Module, recipe: Mapping[str, Any], **more: Any) -> History:
    """:func:`recover` ``model`` from the job's own one; the recipe's seed goes before the job's."""
    options = {"on_step": job.on_step, "seed": job.seed, **recipe, **more}
    return recover(model, job.training_data("recovery"), teacher=job.model, **options)


def accuracy(model: nn.Module, data: Batches) -> float:
    """The share of images whose highest logit is their label's, or that of the highest of several labels."""
    right = seen = 0
    with evaluating(model), torch.no_grad():
        for batch in data:
            images, labels = read_batch(batch, model, "accuracy")
            assert labels is not None
            best = labels.argmax(-1) if labels.dim() > 1 else labels
            right += int((model(images).argmax(-1) == best).sum())
            seen += len(labels)
    expect(seen > 0, PruningError, "at least one image to measure accuracy on", got="none")
    return right / seen


class _Run:
    penalty: Callable[[nn.Module], Tensor] | None = None
    on_step: Callable[[Step], None] | None = None
    on_epoch: Callable[[Mapping[str, float]], None] | None = None

    def __init__(
        self,
        model: nn.Module,
        data: Batches,
        teacher: nn.Module | None,
        validation: Batches | None,
        recipe: Recipe,
        state: Path | None,
    ) -> None:
        self.model, self.validation, self.recipe, self.state = model, validation, recipe, state
        self.device = next(model.parameters()).device
        self.rank, self.world = _join_processes(self.device)
        self.dealer = Dealer(data, self.rank, self.world)
        self.updates = -(-self.dealer.batches // recipe.accumulate)
        whole = recipe.epochs * self.updates
        self.total = whole if recipe.max_steps is None else min(recipe.max_steps, whole)
        self.loss = Loss(recipe, model, teacher)
        student = Student(model, Loss.features(recipe, teacher))
        self.student: nn.Module = DistributedDataParallel(student) if self.world > 1 else student
        trains = any(weight.requires_grad for weight in model.parameters())
        expect(trains, PruningError, "a model with weights to train", got="requires_grad False of all of them")
        try:
            self.optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
        except ValueError as error:
            what = "an opt that timm has, such as adamw, lamb or sgd"
            raise PruningError(f"expected {what}, got {recipe.opt}: {error}") from None
        epochs: Any = self.total / self.updates  # a part of an epoch where max_steps ends training
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=recipe.sched,
            num_epochs=epochs,
            decay_epochs=epochs / 3,
            warmup_epochs=recipe.warmup_epochs,
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
            **SCHEDULES[recipe.sched],
        )
        amp = self.device.type == "cuda" if recipe.amp is None else recipe.amp
        self.autocast = torch.autocast(self.device.type, getattr(torch, recipe.amp_dtype), enabled=amp)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp and recipe.amp_dtype == "float16")
        self.ema = None if recipe.ema_decay is None else ModelEmaV3(model, decay=recipe.ema_decay)
        self.mix = Mixing(recipe, model) if recipe.mixup or recipe.cutmix else None
        self.step, self.history = 0, History()
        self.identity = {} if state is None else self._identity(teacher)

    def train(self) -> History:
        self._resume()
        for epoch in range(len(self.history), self.recipe.epochs):
            if self.step >= self.total:
                break
            self.student.train()
            mean = self._epoch(epoch)
            facts = {"epoch": epoch, "steps": self.step, "loss": mean, "lr": self.optimizer.param_groups[0]["lr"]}
            if self.validation is not None:
                facts["accuracy"] = accuracy(self._best(), self.validation)
            self.history.append(facts)
            self._save()
            if self.on_epoch is not None:
                self.on_epoch(facts)
        if self.ema is not None:
            self.model.load_state_dict(self.ema.module.state_dict())
        return self.history

    def _epoch(self, epoch: int) -> float:
        losses, waiting, group = [], 0, 0
        self.optimizer.zero_grad()
        for at, batch in enumerate(self.dealer.epoch(self.recipe.seed, epoch)):
            images, target = read_batch(batch, self.model, "recover")
            assert target is not None
            if at % self.recipe.accumulate == 0:
                group = min(self.recipe.accumulate, self.dealer.batches - at)
            if self.mix is not None:
                images, target = self.mix(images, target)
            with self.autocast:
                output = self.student(images)
                loss = self.loss(output, images, target)
            if self.penalty is not None:
                loss = loss + self.penalty(self.model)
            value = loss.item()
            if not np.isfinite(value):
                raise PruningError(
                    f"expected a finite loss, got {value} at step {self.step}: lower lr, or set clip_grad"
                )
            self.scaler.scale(loss / group).backward()  # type: ignore[no-untyped-call]
            losses.append(value)
            waiting += 1
            if waiting == group:
                self._update(epoch, value)
                waiting = 0
                if self.step >= self.total:
                    break
        return float(np.mean(losses))

    def _update(self, epoch: int, loss: float) -> None:
        self.scheduler.step_update(self.step)
        if self.recipe.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        if self.on_step is not None:
            lr = self.optimizer.param_groups[0]["lr"]
            self.on_step(Step(self.step, self.total, epoch, loss, lr))

    def _best(self) -> nn.Module:
        return self.model if self.ema is None else self.ema.module

    # -- on disk -----------------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        return {"model": self.model} | ({} if self.ema is None else {"ema": self.ema.module})

    def _identity(self, teacher: nn.Module | None) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "updates": self.updates,
            "model": fingerprint(self.model),
            "teacher": None if teacher is None else fingerprint(teacher),
        }

    def _resume(self) -> None:
        if self.state is None or not self.state.exists():
            return
        facts = read_facts(self.state)
        given, found = ({**of, **of.get("recipe", {})} for of in (self.identity, facts))
        differing = [name for name in given if name != "recipe" and found.get(name) != given[name]]
        told, got = (", ".join(f"{name} {of.get(name)}" for name in differing) for of in (given, found))
        expect(
            not differing,
            CheckpointError,
            f"{self.state} to be of this run, its {told} (or name another file)",
            got=got,
        )
        read_state(self.state, facts, self._modules(), self.optimizer)
        self.history, self.step = facts["history"], facts["step"]
        self.scaler.load_state_dict(facts["scaler"])

    def _save(self) -> None:
        if self.state is not None and self.rank == 0:
            progress = {"history": self.history, "step": self.step, "scaler": self.scaler.state_dict()}
            write_state(self.state, self._modules(), self.optimizer, self.identity | progress)
        if self.state is not None and self.world > 1:
            # NCCL's would wait on the current GPU, which need not be the model's
            own = [self.device.index] if dist.get_backend() == "nccl" and self.device.index is not None else None
            dist.barrier(device_ids=own)


def _join_processes(device: torch.device) -> tuple[int, int]:
    """Rank and number of processes, as torchrun set them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextmanager
def _both_heads(model: nn.Module) -> Iterator[None]:
    """Inside, a distilled model in training gives the logits of both heads, of which one learns from the teacher."""
    if not hasattr(model, "head_dist"):
        yield
        return
    distilled: Any = model
    before = distilled.distilled_training
    distilled.set_distilled_training(True)
    try:
        yield
    finally:
        distilled.set_distilled_training(before)


@contextmanager
def _own_chance(device: torch.device) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
