"""A pack is never stale: whatever writes to the weights, the next call computes with what they now hold."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from prunevit.nn import accelerate, restore
from prunevit_kernels import Target
from prunevit_kernels._packs import PackCache, same_bytes
from prunevit_kernels.library import packs
from tests.nn.models import check_model, images, randomise, tiny

pytestmark = pytest.mark.filterwarnings("error:.*reference path")


def weights(model: Any) -> list[nn.Parameter]:
    attn, mlp = model.blocks[0].attn, model.blocks[1].mlp
    return [attn.qkv.weight, attn.proj.bias, mlp.fc1.weight, mlp.fc2.bias, model.blocks[0].norm1.weight]


def step(model: Any, optimiser: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    optimiser.zero_grad()


def assign(model: Any) -> None:
    state = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def ema(model: Any) -> None:
    """The model is timm's average of another."""
    other = tiny()
    randomise(other, seed=8)
    average = ModelEmaV3(other, decay=0.5)
    average.module = model
    average.update(other)


def swap_parameters(model: Any) -> None:
    """Two parameters trade their memory: every address is one that was seen before."""
    first, second = model.blocks[0].attn.qkv.weight, model.blocks[1].attn.qkv.weight
    first.data, second.data = second.data, first.data


def reuse_the_address(model: Any) -> None:
    """New memory where the old was: allocators give back what was just freed."""
    for _ in range(4):
        new = model.blocks[0].mlp.fc1.weight.detach() * 1.5
        model.blocks[0].mlp.fc1.weight.data = new
        del new


def there_and_back(model: Any) -> None:
    model.double()
    model.blocks[0].attn.qkv.weight.data.mul_(2)
    model.float()


def set_again(model: Any) -> None:
    """``torch.nn.utils.prune.remove`` does so: what was first among a module's parameters is now last."""
    norm = model.blocks[0].norm1
    weight = norm.weight.detach() * 1.5
    del norm.weight
    norm.weight = nn.Parameter(weight)


COUNTED: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda m: step(m, torch.optim.SGD(m.parameters(), lr=0.1, foreach=False)),
    "sgd_foreach": lambda m: step(m, torch.optim.SGD(m.parameters(), lr=0.1, foreach=True)),
    "sgd_fused": lambda m: step(m, torch.optim.SGD(m.parameters(), lr=0.1, fused=True)),
    "adamw": lambda m: step(m, torch.optim.AdamW(m.parameters(), lr=0.1, foreach=False)),
    "adamw_foreach": lambda m: step(m, torch.optim.AdamW(m.parameters(), lr=0.1, foreach=True)),
    "adamw_fused": lambda m: step(m, torch.optim.AdamW(m.parameters(), lr=0.1, fused=True)),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
    "load_state_dict_assign": assign,
    "state_dict_copy": lambda m: [v.mul_(1.5) for v in m.state_dict().values()],
    "ema": ema,
    "reset_parameters": lambda m: m.blocks[0].attn.qkv.reset_parameters(),
    "no_grad_write": lambda m: [torch.no_grad()(p.mul_)(1.5) for p in weights(m)],
    "detach_write": lambda m: [p.detach().mul_(1.5) for p in weights(m)],
    "inference_mode_write": lambda m: [torch.inference_mode()(p.mul_)(1.5) for p in weights(m)],
    "index_write": lambda m: torch.no_grad()(m.blocks[1].mlp.fc2.weight[3:5].fill_)(2.0),
    "data_assigned": lambda m: [setattr(p, "data", p.data * 1.5) for p in weights(m)],
    "address_reused": reuse_the_address,
    "memory_swapped": swap_parameters,
    "to_and_back": there_and_back,
    "parameter_replaced": lambda m: setattr(m.blocks[0].attn.qkv, "weight", nn.Parameter(torch.ones(72, 24))),
    "parameters_set_again": set_again,
    "module_replaced": lambda m: setattr(m.blocks[0].mlp, "fc2", nn.Linear(96, 24)),
    "bias_removed": lambda m: setattr(m.blocks[0].mlp.fc2, "bias", None),
    "eps_changed": lambda m: setattr(m.blocks[0].norm1, "eps", 0.5),
    "activation_changed": lambda m: setattr(m.blocks[0].mlp, "act", nn.ReLU()),
    "heads_changed": lambda m: (setattr(m.blocks[0].attn, "num_heads", 4), setattr(m.blocks[0].attn, "head_dim", 6)),
}

UNCOUNTED: dict[str, Callable[[Any], Any]] = {
    "data_write": lambda m: [p.data.mul_(1.5) for p in weights(m)],
    "data_write_of_one_number": lambda m: m.blocks[1].mlp.fc2.weight.data[23, 95].add_(4.0),
    "dino_teacher": lambda m: [p.data.mul_(0.9).add_(0.1 * torch.ones_like(p).data) for p in m.parameters()],
    "numpy_write": lambda m: m.blocks[0].attn.qkv.weight.detach().numpy().__imul__(1.5),
    "dlpack_write": lambda m: torch.from_dlpack(m.blocks[0].attn.proj.weight.detach()).mul_(1.5),
    "rows_permuted": lambda m: m.blocks[0].mlp.fc1.weight.data.copy_(m.blocks[0].mlp.fc1.weight.data.flip(0)),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()).detach() * 1.2, m.parameters()
    ),
}

CASES = [(name, check) for name in COUNTED for check in ("contents", "versions")]
CASES += [(name, "contents") for name in UNCOUNTED]

# whole: one plan and one pack for the model; blocks: a hook inside has them run one by one
WAYS = ("whole", "blocks")


def accelerated(eager: Any, way: str, check: Any = "contents") -> Any:
    model = accelerate(copy.deepcopy(eager), check=check)
    if way == "blocks":
        model.norm.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert (model.refusal(images(model)) is None) == (way == "whole")
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "check"), CASES)
def test_a_write_is_seen(name: str, check: Any, way: str) -> None:
    eager = tiny()
    model, x = accelerated(eager, way, check), images(eager)
    check_model(model, eager, x)
    with torch.no_grad():
        before = model(x)
    ({**COUNTED, **UNCOUNTED})[name](model)
    after = restore(copy.deepcopy(model))
    with torch.no_grad():
        moved = (after(x) - before).abs().max()
    assert moved > 1e-3 * before.abs().max(), "this write changes nothing that a test could see"
    check_model(model, after, x)
    check_model(model, after, x)


@pytest.mark.parametrize("way", WAYS)
def test_a_write_between_threads_calls_is_seen(way: str) -> None:
    """No thread sees another's buffers, and all see the same weights."""
    eager = tiny()
    model, x = accelerated(eager, way), images(eager, 3)
    for scale in (1.0, 1.3, 0.7):
        with torch.no_grad():
            model.blocks[0].mlp.fc2.weight.data.mul_(scale)
            eager.blocks[0].mlp.fc2.weight.data.mul_(scale)
            want = eager(x)
        made, results, failures = packs.made, [], []

        def call(results: list[Any] = results, failures: list[BaseException] = failures) -> None:
            try:
                with torch.no_grad():
                    results += [(batch, model(x[:batch])) for batch in (3, 1, 2) * 5]
            except Exception as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(results) == 60
        for batch, got in results:
            torch.testing.assert_close(got, want[:batch], rtol=1e-4, atol=1e-4)
        assert packs.made - made in (1, 2), "threads share packs: all at first, then the one that changed"


def test_a_result_belongs_to_its_caller() -> None:
    block, x = accelerate(tiny()).blocks[0], torch.ones(1, 7, 24)
    with torch.no_grad():
        first = block(x)
        kept = first.clone()
        block(x + 1)
    assert torch.equal(first, kept)
    assert torch.equal(x, torch.ones(1, 7, 24))


@pytest.mark.parametrize("check", ["contents", "versions"])
@pytest.mark.parametrize("way", WAYS)
def test_unchanged_weights_are_packed_once(check: Any, way: str) -> None:
    model = accelerated(tiny(), way, check)
    made = packs.made
    with torch.no_grad():
        for batch in (1, 2, 5, 3, 4, 6, 1):
            model(images(model, batch))
        # what was found out about the modules is looked for again, and leads to the same pack
        model.train().eval()
        model(images(model, 1))
    assert packs.made - made == (1 if way == "whole" else 2)


def test_an_optimiser_of_sparse_parameters_steps_on() -> None:
    """Steps of every optimiser are watched, also of those whose parameters have no storage."""
    model = accelerated(tiny(), "whole", "versions")
    sparse = nn.Parameter(torch.eye(3).to_sparse())
    optimiser = torch.optim.SGD([sparse], lr=0.1)
    with torch.no_grad():
        model(images(model))
    torch.sparse.mm(sparse, torch.ones(3, 1)).sum().backward()
    optimiser.step()
    assert torch.equal(sparse.detach().to_dense(), torch.eye(3) * 0.9)


def test_a_step_of_another_models_optimiser_packs_nothing() -> None:
    teacher, student = accelerated(tiny(), "whole", "versions"), nn.Linear(2, 2)
    optimiser, x = torch.optim.SGD(student.parameters(), lr=0.1, fused=True), images(teacher)
    with torch.no_grad():
        teacher(x)
    made = packs.made
    for _ in range(3):
        step(student, optimiser)
        with torch.no_grad():
            teacher(x)
    assert packs.made == made


def test_parameters_may_be_swapped() -> None:
    eager = tiny()
    model, x = accelerated(eager, "whole"), images(eager)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        check_model(model, eager, x)
        model.double().float()
        check_model(model, eager, x)
        randomise(eager, seed=5)
        model.load_state_dict(eager.state_dict())
        check_model(model, eager, x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_pack_of_many_bytes_is_compared_by_several_threads() -> None:
    """Any one byte that differs is seen, whichever thread comes to it."""
    tensors = [torch.zeros(size, dtype=torch.uint8) for size in (3 << 20, 1, 5 << 20, 7, 2 << 20)]
    copies = [t.clone() for t in tensors]
    for threads in (1, 2, 3, 5):
        assert same_bytes(tensors, copies, threads)
        for tensor in tensors:
            for at in (0, len(tensor) // 2, len(tensor) - 1):
                tensor[at] = 1
                assert not same_bytes(tensors, copies, threads)
                tensor[at] = 0


def test_a_forked_child_compares_with_threads_of_its_own() -> None:
    tensors = [torch.zeros(8 << 20, dtype=torch.uint8)]
    copies = [t.clone() for t in tensors]
    assert same_bytes(tensors, copies, 2)
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # a child that waits for its parent's threads waits for ever
        tensors[0].numpy()[-1] = 1
        os._exit(0 if not same_bytes(tensors, copies, 2) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_child_forked_while_another_thread_packs_packs_too() -> None:
    cache, begun, end = PackCache(), threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        begun.set()
        end.wait(30)

    weights, target = [torch.zeros(3)], Target("torch")
    packing = threading.Thread(target=lambda: cache.get("slow", weights, target, slow, trust_versions=True))
    packing.start()
    begun.wait(30)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        cache.get("quick", weights, target, lambda *_: None, trust_versions=True)
        os._exit(0)
    end.set()
    packing.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_weights_made_in_inference_mode() -> None:
    """They count no versions: their contents are compared, whatever check says."""
    with torch.inference_mode():
        model = accelerate(tiny(), check="versions")
        x = images(model)
        model(x)
        model.blocks[0].mlp.fc1.weight.mul_(1.5)
        got = model(x)
        want = restore(model)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_block_is_asked_only_when_something_is_unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, asked = accelerate(tiny()).blocks[0], torch.ones(1, 7, 24), []
    refusal = type(block).refusal
    monkeypatch.setattr(type(block), "refusal", lambda self, *a: asked.append(a) or refusal(self, *a))
    with torch.no_grad():
        want = block(x)
        assert asked == []
        block.mlp.fc1.register_forward_hook(lambda *_: None)
        with pytest.warns(RuntimeWarning, match="reference path: mlp.fc1 has a forward hook"):
            got = block(x)
    assert len(asked) == 1
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
