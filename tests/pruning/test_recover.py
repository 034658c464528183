"""Recovery learns, repeats itself, resumes, and trains only what the compact model has."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from prunevit.errors import CheckpointError, PruningError
from prunevit.models import PrunedViT
from prunevit.pruning import Plan, Step, accuracy, prune, recover
from prunevit.pruning.recipe import Loss, Mixing, Recipe, Student
from prunevit.pruning.training_state import read_facts
from tests.specs import SPECS, block, random_images, random_model, vit

SPEC = vit(block(), block(), embed_dim=32)


def problem(images: int = 32) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Seven classes, each a constant brightness: quickly learnt."""
    labels = torch.arange(images) % 7
    noise = torch.randn(images, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    dataset = TensorDataset(noise * 0.1 + labels.view(-1, 1, 1, 1) / 2, labels)
    return DataLoader(dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(5))


def fresh() -> PrunedViT:
    torch.manual_seed(0)
    return PrunedViT(SPEC)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_it_learns_and_says_how_far_it_is() -> None:
    model, steps = random_model(SPEC), list[Step]()
    data = problem()
    history = recover(model, data, validation=data, epochs=10, lr=3e-3, on_step=steps.append)
    assert [s.step for s in steps] == list(range(1, 41))
    assert steps[0].total == 40
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["accuracy"] == accuracy(model, data) > 0.4


def test_the_schedule_ends_where_training_ends() -> None:
    steps = list[Step]()
    recover(fresh(), problem(80), epochs=9, max_steps=15, warmup_epochs=0, min_lr=0.0, lr=1e-3, on_step=steps.append)
    assert len(steps) == steps[-1].step == 15
    assert steps[-1].lr < 0.02e-3 < steps[-2].lr  # a cosine of one epoch and a half, not of two


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_chance() -> None:
    before = torch.random.get_rng_state()
    models = [fresh() for _ in range(3)]
    before = torch.random.get_rng_state()
    for model, seed in zip(models, (0, 0, 1)):
        recover(model, problem(), epochs=2, mixup=0.8, cutmix=1.0, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(weights(models[0]), weights(models[1]))
    assert not torch.equal(weights(models[0]), weights(models[2]))


@pytest.mark.parametrize("recipe", [{"mixup": 0.8}, {"cutmix": 1.0}], ids=str)
def test_mixing_leaves_the_callers_images(recipe: dict[str, float]) -> None:
    data = list(problem())
    before = [images.clone() for images, _ in data]
    recover(fresh(), data, epochs=2, **recipe)
    assert all(torch.equal(images, kept) for (images, _), kept in zip(data, before, strict=True))


@pytest.mark.parametrize("images", [1, 3, 4])
def test_mixing_leaves_an_odd_image_as_it_is(images: int) -> None:
    mix = Mixing(Recipe(mixup=0.8, cutmix=1.0), fresh())
    x, labels = random_images(SPEC, images), torch.arange(images)
    mixed, target = mix(x, labels)
    assert target.shape == (images, 7)
    torch.testing.assert_close(target.sum(1), torch.ones(images))
    if images % 2:
        assert torch.equal(mixed[-1], x[-1])
        assert target[-1].argmax() == labels[-1]
    recover(fresh(), [(x, labels)], epochs=1, mixup=0.8)
    with pytest.raises(PruningError, match=r"whole numbers, to mix, got torch\.float32"):
        recover(fresh(), [(x, target)], epochs=1, mixup=0.8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_images_take_the_models_dtype(dtype: torch.dtype) -> None:
    model, teacher = fresh().to(dtype), fresh()
    before = weights(model)
    recover(model, problem(), teacher=teacher, epochs=1, distillation="feature")
    assert weights(model).dtype == dtype
    assert not torch.equal(weights(model), before)
    assert 0 <= accuracy(model, problem()) <= 1
    soft = [(images, F.one_hot(labels, 7).to(dtype)) for images, labels in problem()]
    recover(model, soft, epochs=1)


def test_accuracy_of_several_labels_is_that_of_the_highest() -> None:
    model, images = fresh(), random_images(SPEC, 7)  # as many images as classes
    labels = model(images).argmax(-1)
    assert accuracy(model, [(images, F.one_hot(labels, 7).float())]) == accuracy(model, [(images, labels)]) == 1.0


@pytest.mark.parametrize("name", ["no_classes", "no_pool", "distilled_no_classes"])
def test_labels_need_a_classifier(name: str) -> None:
    model = random_model(SPECS[name])
    data = [(random_images(model.spec, 4), torch.arange(4))]
    for call in (
        lambda: recover(model, data, epochs=1),
        lambda: recover(model, data, teacher=model, distillation="feature", epochs=1),
        lambda: accuracy(model, data),
        lambda: prune(model, "taylor", {"macs": "80%"}, data),
    ):
        with pytest.raises(PruningError, match="a classifier and a pooling"):
            call()


def test_each_epoch_is_told_once_its_state_is_written(tmp_path: Path) -> None:
    told, state = [], tmp_path / "run"

    def tell(facts: Mapping[str, float]) -> None:
        assert read_facts(state)["history"][-1] == facts
        told.append(facts)

    history = recover(fresh(), problem(), epochs=3, validation=problem(), state=state, on_epoch=tell)
    assert told == history
    assert [set(facts) for facts in told] == [{"epoch", "steps", "loss", "lr", "accuracy"}] * 3


def test_weights_that_are_all_frozen_are_refused() -> None:
    with pytest.raises(PruningError, match="weights to train"):
        recover(fresh().requires_grad_(False), problem(), epochs=1)


@pytest.mark.parametrize(
    ("sched", "first", "middle", "last"),
    [("poly", 5e-4, 2.5e-4, 0), ("step", 5e-4, 5e-5, 5e-6), ("cosine", 5e-4, 2.5e-4, 0)],
)
def test_a_schedule_decays_within_the_training(sched: str, first: float, middle: float, last: float) -> None:
    steps = list[Step]()
    recover(fresh(), [next(iter(problem()))], epochs=31, sched=sched, min_lr=0.0, on_step=steps.append)
    assert [steps[i].lr for i in (0, 15, 30)] == pytest.approx([first, middle, last], rel=0.1, abs=3e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"ema_decay": 0.9, "accumulate": 4, "mixup": 0.8, "cutmix": 1.0, "warmup_epochs": 1, "clip_grad": 1.0},
        {"opt": "sgd", "sched": "step", "amp": True},
    ],
    ids=["plain", "everything", "amp"],
)
def test_an_interrupted_run_resumes_to_the_same_weights(recipe: dict[str, object], tmp_path: Path) -> None:
    whole, broken = fresh(), fresh()
    history = recover(whole, problem(), epochs=3, **recipe)
    with pytest.raises(Interrupted):
        recover(broken, problem(), epochs=3, state=tmp_path / "run", on_step=stop, **recipe)
    again = fresh()
    assert recover(again, problem(), epochs=3, state=tmp_path / "run", **recipe) == history
    assert torch.equal(weights(again), weights(whole))
    with pytest.raises(CheckpointError, match="of this run"):
        recover(fresh(), problem(), epochs=4, state=tmp_path / "run", **recipe)
    (tmp_path / "run").write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="expected the state of a training run"):
        recover(fresh(), problem(), epochs=3, state=tmp_path / "run", **recipe)


def test_validation_is_looked_at_after_each_epoch() -> None:
    with pytest.raises(PruningError, match="validation= of batches to go through again and again"):
        recover(fresh(), problem(), epochs=2, validation=iter(problem()))


def test_the_state_of_another_recipe_is_refused_by_the_options_that_differ(tmp_path: Path) -> None:
    recover(fresh(), problem(), epochs=1, state=tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=r"its lr 0.1, mixup 0.5 \(or name another file\), got lr 0.0005, mixup 0.0$"
    ):
        recover(fresh(), problem(), epochs=1, state=tmp_path / "run", lr=0.1, mixup=0.5)


def test_a_state_of_another_model_or_teacher_is_refused(tmp_path: Path) -> None:
    dense = random_model(SPEC)
    first, second = (prune(dense, method, pruning_ratio=0.5) for method in ("magnitude", "random"))
    assert first.spec == second.spec
    recover(first, problem(), epochs=1, state=tmp_path / "run")
    before = weights(second)
    for model, teacher in ((second, None), (prune(dense, "magnitude", pruning_ratio=0.5), dense)):
        with pytest.raises(CheckpointError, match=r"of this run, its (model|teacher)"):
            recover(model, problem(), epochs=1, state=tmp_path / "run", teacher=teacher)
    assert torch.equal(weights(second), before)


def test_features_are_learnt_from_a_teacher_that_was_pruned_itself() -> None:
    once = prune(random_model(SPEC), "magnitude", {"macs": "80%"}, groups=("channel",))
    recipe = {"epochs": 1, "distillation": "feature"}
    twice = prune(once, "magnitude", {"macs": "80%"}, train=problem(), recovery=recipe, groups=("channel",))
    kept, had = (Plan.of(model).channels for model in (twice, once))
    assert set(kept) < set(had) < set(range(32))
    loss = Loss(Recipe.of(recipe), twice, once)
    assert loss.channels is not None
    assert [had[place] for place in loss.channels] == list(kept)
    other = prune(random_model(SPEC, seed=3), "random", pruning_ratio=0.2, groups=("channel",))
    with pytest.raises(PruningError, match=f"from a teacher of width {len(kept)} or of the plan, got 25"):
        Loss(Recipe.of(recipe), twice, other)


class Noisy(TensorDataset):
    """Every reading of an image draws anew."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn_like(image), label


@pytest.mark.parametrize("lives_on", [False, True], ids=["workers_of_an_epoch", "workers_that_live_on"])
def test_a_run_with_loader_workers_resumes_to_the_same_weights(lives_on: bool, tmp_path: Path) -> None:
    """Workers draw by the chance that they were started with: an uninterrupted run must start them anew as well."""
    noisy = Noisy(*problem(16).dataset[:])
    data = DataLoader(noisy, 8, shuffle=True, num_workers=1, persistent_workers=lives_on)
    whole, broken, again = fresh(), fresh(), fresh()
    recover(whole, data, epochs=2)
    with pytest.raises(Interrupted):
        recover(broken, data, epochs=2, state=tmp_path / "run", on_step=stop)
    recover(again, data, epochs=2, state=tmp_path / "run")
    assert torch.equal(weights(again), weights(whole))


def test_accumulating_batches_is_one_larger_batch() -> None:
    images, labels = random_images(SPEC, 16), torch.arange(16) % 7
    split = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 16, 4)]
    one, four = fresh().double(), fresh().double()
    recover(one, [(images.double(), labels)], epochs=2, opt="sgd", lr=0.1)
    recover(four, [(x.double(), y) for x, y in split], epochs=2, opt="sgd", lr=0.1, accumulate=4)
    torch.testing.assert_close(weights(four), weights(one))


def test_an_average_is_what_the_model_ends_with() -> None:
    plain, averaged = fresh(), fresh()
    start = weights(plain)
    recover(plain, problem(), epochs=1)
    recover(averaged, problem(), epochs=1, ema_decay=0.99)
    assert (weights(averaged) - start).norm() < 0.6 * (weights(plain) - start).norm()


@pytest.mark.parametrize("distillation", ["hard", "soft", "feature"])
def test_a_teacher_draws_its_student_nearer(distillation: str) -> None:
    teacher = random_model(SPEC)
    images = random_images(SPEC, 32)
    data = [(images, torch.zeros(32, dtype=torch.long))]
    student = prune(teacher, "magnitude", {"macs": "70%"}, groups=("qk", "v", "mlp", "channel"))

    def distance() -> float:
        with torch.no_grad():
            p, q = (m.eval()(images).log_softmax(-1) for m in (student, teacher))
        if distillation == "hard":
            return float(F.nll_loss(p, q.argmax(-1)))
        return float(F.kl_div(p, q, reduction="batchmean", log_target=True))

    before, teachers = distance(), weights(teacher)
    recover(student, data, teacher=teacher, epochs=15, lr=2e-3, alpha=1.0, distillation=distillation)
    assert distance() < 0.7 * before
    assert torch.equal(weights(teacher), teachers)
    assert not teacher.training


def test_losses_are_what_they_say() -> None:
    teacher, student = random_model(SPEC), random_model(SPEC, seed=1)
    images, labels = random_images(SPEC, 4), torch.tensor([0, 1, 2, 3])
    s, t = student(images), teacher(images)
    ce = F.cross_entropy(s, labels)
    soft = (t / 2).softmax(-1)
    kl = (soft * (soft.log() - (s / 2).log_softmax(-1))).sum(-1).mean() * 4
    hard = F.cross_entropy(s, t.argmax(-1))
    a, b = (m.forward_head(m.forward_features(images), pre_logits=True) for m in (student, teacher))
    feature = kl + ((a - b) ** 2).mean() / (b**2).mean()
    for name, lesson in (("hard", hard), ("soft", kl), ("feature", feature)):
        recipe = Recipe(distillation=name, alpha=0.25, temperature=2.0)  # type: ignore[arg-type]
        loss = Loss(recipe, student, teacher)
        got = loss(Student(student, Loss.features(recipe, teacher))(images), images, labels)
        torch.testing.assert_close(got, 0.75 * ce + 0.25 * lesson)


@pytest.mark.parametrize("by_hand", [False, True])
def test_the_second_head_of_a_distilled_model_learns_from_the_teacher_alone(by_hand: bool) -> None:
    spec = SPECS["distilled"]
    teacher, images, labels = random_model(spec, seed=1), random_images(spec), torch.tensor([0, 1, 2])
    sgd = {"epochs": 1, "opt": "sgd", "weight_decay": 0.0, "lr": 0.1, "distillation": "hard"}

    def moved(alpha: float) -> tuple[bool, bool]:
        model = random_model(spec)
        before = model.head.weight.detach().clone(), model.head_dist.weight.detach().clone()
        model.set_distilled_training(by_hand)
        recover(model, [(images, labels)], teacher=teacher, alpha=alpha, **sgd)
        assert model.distilled_training is by_hand
        return not torch.equal(model.head.weight, before[0]), not torch.equal(model.head_dist.weight, before[1])

    assert moved(alpha=0.0) == (True, False)
    assert moved(alpha=1.0) == (False, True)


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_is_left_in_its_own_mode(fails: bool) -> None:
    model = fresh().eval()
    model.blocks[0].train()
    before = [module.training for module in model.modules()]
    data = list(problem())
    data[1:2] = [(data[1][0], data[1][1] + 7)] if fails else []
    with pytest.raises(PruningError) if fails else nullcontext():
        recover(model, data, epochs=1)
    accuracy(model, problem())
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"epoch": 3}, "options of recover"),
        ({"distillation": "harder"}, "hard, soft, feature"),
        ({"epochs": 0}, "epochs"),
        ({"alpha": 2.0}, "alpha"),
        ({"mixup": "lots"}, "mixup to be float, got 'lots'"),
        ({"amp_dtype": "fp8"}, "amp_dtype out of bfloat16, float16, got 'fp8'"),
        ({"opt": "nope"}, "such as adamw.* got nope"),
        ({"sched": "plateau"}, "sched out of cosine, poly, step, got 'plateau'"),
        ({"max_steps": 0}, "max_steps above 0, got 0"),
        ({"clip_grad": -1.0}, "clip_grad above 0, got -1"),
        ({"weight_decay": -1.0}, "weight_decay of at least 0, got -1"),
        ({"warmup_epochs": -1}, "warmup_epochs of at least 0, got -1"),
        ({"seed": -1}, "seed of at least 0, got -1"),
        ({"lr": 1e12, "opt": "sgd", "epochs": 20}, "finite loss"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], reason: str) -> None:
    with pytest.raises(PruningError, match=reason):
        recover(fresh(), problem(), **options)


def test_data_without_a_length_is_refused() -> None:
    with pytest.raises(PruningError, match="length"):
        recover(fresh(), (batch for batch in problem()), epochs=1)


WORKER = """
import json, os, sys
from collections import Counter
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
import prunevit.data._folder as folder
from prunevit.data import load_data
from prunevit.pruning import recover
from tests.pruning.test_recover import SPEC, Interrupted, fresh, stop, weights
from tests.specs import random_images

images, labels = random_images(SPEC, 8).double(), torch.arange(8) % 7
sgd = {"epochs": 3, "opt": "sgd", "lr": 0.1}
shuffled = {"shuffle": True, "generator": torch.Generator()}
dataset = TensorDataset(images, labels)
dealt, loaded, folders = fresh().double(), fresh().double(), [fresh() for _ in range(3)]
recover(dealt, [(images[:4], labels[:4]), (images[4:], labels[4:])], **sgd)
recover(loaded, DataLoader(dataset, 2, **shuffled), **sgd)

# the folder's augmentation is by chance: two runs are the same only if all of it comes from the seed
data = load_data(sys.argv[1])
config = {"input_size": (3, 12, 16), "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.2,) * 3,
          "crop_pct": 1.0, "crop_mode": "center"}
loader = data.loader("train", config, batch_size=4, augment=True)
whole, broken, resumed = folders
decoded, read = [], folder.Files.__getitem__
folder.Files.__getitem__ = lambda self, index: decoded.append(index) or read(self, index)
recover(whole, loader, epochs=2)
everybodys = [None] * 2
dist.all_gather_object(everybodys, decoded)
assert len(loader) == 4
assert Counter(everybodys[0] + everybodys[1]) == Counter({i: 2 for i in range(16)}), everybodys
try:
    recover(broken, loader, epochs=2, state=sys.argv[2], on_step=stop)
except Interrupted:
    recover(resumed, loader, epochs=2, state=sys.argv[2])
assert torch.equal(weights(resumed), weights(whole))

rank = dist.get_rank()
dist.destroy_process_group()
os.environ["WORLD_SIZE"] = "1"
one, other = fresh().double(), fresh().double()
recover(one, [(images, labels)], **sgd)
torch.testing.assert_close(weights(dealt), weights(one))
recover(other, DataLoader(dataset, 4, **shuffled), **sgd)
torch.testing.assert_close(weights(loaded), weights(other))
assert not torch.allclose(weights(loaded), weights(dealt)), "shuffling matters here"
print(f"same {rank}\\n", end="", flush=True)
"""


class Interrupted(Exception):
    pass


def stop(step: Step) -> None:
    if step.epoch == 1:
        raise Interrupted


def test_two_processes_under_torchrun_are_one_larger_batch(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        (tmp_path / "images" / "val" / name).mkdir(parents=True)
        for i in range(12):
            part = "val" if i >= 10 else "train"
            Image.new("RGB", (20, 16), (100 + 10 * i, 20 * i, 5)).save(tmp_path / "images" / part / name / f"{i}.png")
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    command += [str(tmp_path / "images"), str(tmp_path / "state")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split()) == ["0", "1", "same", "same"]
