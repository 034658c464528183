"""A pack lives as long as its weights, and no more of them are kept than are used."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from prunevit.nn import accelerate, restore
from prunevit_kernels._packs import MOST_TARGETS, MOST_UNTIED, PackCache
from prunevit_kernels.library import packs
from prunevit_kernels.target import Target
from tests.nn.models import images, tiny
from tests.nn.test_packs import WAYS, accelerated

pytestmark = pytest.mark.filterwarnings("error:.*reference path")


@pytest.mark.parametrize("check", ["contents", "versions"])
@pytest.mark.parametrize("way", WAYS)
def test_packs_die_with_their_parameters(check: Any, way: str) -> None:
    gc.collect()
    alive = len(packs)
    model = accelerated(tiny(), way, check)
    with torch.no_grad():
        model(images(model))
    made = 1 if way == "whole" else 2
    assert len(packs) == alive + made
    watched = weakref.ref(model.blocks[0].attn.qkv.weight)
    model.blocks[1].mlp.fc1.weight = nn.Parameter(model.blocks[1].mlp.fc1.weight.detach().clone())
    gc.collect()
    assert len(packs) == alive + made - 1, "one parameter went, and one pack with it"
    del model
    gc.collect()
    assert watched() is None
    assert len(packs) == alive


def refer_to_itself(model: Any) -> None:
    model.describe = types.MethodType(lambda self: 1, model)
    model.blocks[0].attn.owners = [model]


@pytest.mark.parametrize("change", [lambda m: None, refer_to_itself, lambda m: m.compile()])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_that_is_known_of_a_model_keeps_it(change: Callable[[Any], Any], way: str) -> None:
    model = accelerated(tiny(), way)
    change(model)
    with torch.no_grad():
        model.forward(images(model))
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_a_model_goes_without_the_garbage_collector() -> None:
    """Its weights and packs are too large to wait for it."""
    alive = len(packs)
    model = accelerate(tiny())
    with torch.no_grad():
        model(images(model))
        model.blocks[0](torch.ones(1, 7, 24))
    gc.collect()
    gc.disable()
    try:
        del model
        assert len(packs) == alive
    finally:
        gc.enable()


@pytest.mark.parametrize("check", ["contents", "versions"])
@pytest.mark.parametrize("way", WAYS)
def test_packs_go_when_a_model_is_restored(check: Any, way: str) -> None:
    gc.collect()
    alive, model = len(packs), accelerated(tiny(), way, check)
    with torch.no_grad():
        model(images(model))
    assert len(packs) > alive
    restore(model)
    assert len(packs) == alive


def test_packs_of_thread_counts_that_are_gone_are_not_kept() -> None:
    model, threads = accelerated(tiny(), "whole"), torch.get_num_threads()
    gc.collect()
    alive = len(packs)
    try:
        with torch.no_grad():
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                model(images(model))
            made = packs.made
            for count in (3, 4, 3):  # two threads of different counts may take turns
                torch.set_num_threads(count)
                model(images(model))
    finally:
        torch.set_num_threads(threads)
    assert len(packs) == alive + 2
    assert packs.made == made


def test_packs_of_parameters_on_memory_that_stays_are_bounded() -> None:
    """A kept state keeps the memory, whose parameters come and go."""
    gc.collect()
    alive, state = len(packs), {name: tensor.clone() for name, tensor in tiny().state_dict().items()}
    for _ in range(5):
        model = accelerate(tiny())
        model.load_state_dict(state, assign=True)
        with torch.no_grad():
            model(images(model))
            model.forward_features(images(model))
        state["norm.weight"].mul_(1.5)
        state["blocks.0.norm1.weight"].mul_(1.5)
        state["blocks.1.norm1.weight"].mul_(1.5)
    del model
    gc.collect()
    assert len(packs) - alive <= 3 * MOST_TARGETS


def test_models_on_the_same_memory_share_a_pack() -> None:
    gc.collect()
    alive, state = len(packs), tiny().state_dict()
    models = [accelerate(tiny()) for _ in range(4)]
    for model in models:
        model.load_state_dict(state, assign=True)
    made = packs.made
    with torch.no_grad():
        want = models[0](images(models[0]))
        for model in models * 2:
            assert torch.equal(model(images(model)), want)
    assert packs.made == made + 1
    del model, models, state
    gc.collect()
    assert len(packs) == alive


def test_a_view_that_goes_leaves_no_pack() -> None:
    base, x = torch.ones(8, 4), torch.ones(1, 2, 4)
    gc.collect()
    alive = len(packs)
    for rows in (3, 5, 7):
        torch.ops.prunevit.norm_linear(x, base[:rows], None, 1e-6)
    assert len(packs) == alive


def test_packs_may_go_while_another_is_made() -> None:
    """Garbage is collected wherever something is allocated; an old model's packs then go in the middle of it."""
    held = [torch.ones(2) for _ in range(40)]
    target = Target("torch")

    class Cycle:
        def __init__(self) -> None:
            self.me, self.weight = self, torch.ones(2)

    thresholds = gc.get_threshold()
    try:
        for allocations in range(1, 121):
            cache, old = PackCache(), [Cycle()]
            for weight in (*held, old[0].weight):
                cache.get("kind", (weight,), target, lambda *_: None, trust_versions=False)

            def make(*_: object, old: list[Cycle] = old, allocations: int = allocations) -> None:
                old.clear()
                gc.set_threshold(gc.get_count()[0] + allocations, 1, 1)
                gc.enable()

            gc.collect()
            gc.disable()
            cache.get("kind", (torch.ones(2),), target, make, trust_versions=False)
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()


def test_packs_without_weights_are_bounded() -> None:
    for width in range(1, MOST_UNTIED + 9):
        torch.ops.prunevit.ragged_attention(torch.zeros(1, 2, 3 * width), [width], [width])
    assert sum(not tied for _, tied in packs._packs.values()) == MOST_UNTIED


def test_old_memory_is_given_back() -> None:
    """After .to(), the next call drops what the old parameters' memory was packed for."""
    model = accelerate(tiny())
    x = images(model)
    with torch.no_grad():
        model(x)
        alive = len(packs)
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=False)
        model(x)
        gc.collect()
    assert len(packs) == alive
