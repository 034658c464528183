"""accelerate: the same model on kernels, and itself wherever they cannot go."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

from prunevit.errors import InputError, UnsupportedModel
from prunevit.nn import KernelModule, RaggedAttention, RaggedBlock, accelerate, restore
from prunevit.nn._module import CPU_KERNELS, GRADIENTS
from prunevit_kernels.library import packs
from tests.nn.models import check_model, images, randomise, tiny
from tests.specs import SPECS, random_images, random_model

pytestmark = pytest.mark.filterwarnings("error:.*reference path")  # a test of the kernels does not pass beside them

SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_biases": {"qkv_bias": False, "proj_bias": False},
    "no_bias_after_the_values": {"proj_bias": False},
    "layer_scale": {"init_values": 0.1},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "gelu_tanh": {"act_layer": "gelu_tanh"},
    "relu": {"act_layer": "relu"},
    "registers_and_average": {"reg_tokens": 3, "global_pool": "avg"},
    "attention_pool": {"global_pool": "map"},
    "pre_norm": {"pre_norm": True},
    "dynamic_image": {"dynamic_img_size": True},
    "narrow_mlp": {"mlp_ratio": 0.3},
}


def kernel_modules(model: nn.Module) -> list[KernelModule]:
    return [m for m in model.modules() if isinstance(m, KernelModule)]


def accelerated(eager: nn.Module, **options: Any) -> Any:
    return accelerate(copy.deepcopy(eager), **options)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_timm_model(switch: str, backend: str) -> None:
    eager = tiny(**SWITCHES[switch])
    model = accelerated(eager, backend=backend)
    assert len(kernel_modules(model)) >= 2
    check_model(model, eager, images(eager))


@pytest.mark.parametrize("name", SPECS)
def test_a_pruned_model(name: str) -> None:
    eager = random_model(SPECS[name])
    model = accelerated(eager) if SPECS[name].blocks else eager
    check_model(model, eager, random_images(SPECS[name]))


def test_every_registered_model_runs_or_says_why() -> None:
    """Whatever timm builds from these modules computes the same after accelerate, on kernels or not."""
    ran = 0
    for name in [n for module in ("vision_transformer", "deit") for n in timm.list_models(module=module)]:
        eager = tiny(name, num_classes=5, num_heads=1, embed_dim=8, patch_size=4)
        try:
            model = accelerated(eager)
        except UnsupportedModel:
            assert "Thing" in str(eager.blocks[0]) or "ParallelScaling" in str(eager.blocks[0]), name
            continue
        x = images(eager, 1)
        with torch.inference_mode(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            got, want = model(x), eager(x)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()), msg=name)
        ran += not told
    assert ran >= 100


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_surface_stays(name: str) -> None:
    eager = tiny(name)
    model = copy.deepcopy(eager)
    before = [(id(m), type(m)) for m in model.modules()], {n: id(p) for n, p in model.named_parameters()}
    assert accelerate(model) is model
    assert type(model.blocks[0]).__name__ == "RaggedBlock"
    assert list(model.state_dict()) == list(eager.state_dict())
    assert {n: id(p) for n, p in model.named_parameters()} == before[1]
    x = images(eager)
    with torch.no_grad():
        for layer, want in zip(model.forward_intermediates(x)[1], eager.forward_intermediates(x)[1]):
            torch.testing.assert_close(layer, want, rtol=1e-4, atol=1e-4)
    assert restore(model) is model
    assert ([(id(m), type(m)) for m in model.modules()], {n: id(p) for n, p in model.named_parameters()}) == before
    assert not any({"kernel_options", "_known"} & set(m.__dict__) for m in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x), eager(x))


def subclassed(module: Any, **methods: Any) -> None:
    """As FSDP does it, and who wants another method on one module."""
    module.__class__ = type("Mine", (type(module),), methods)


@pytest.mark.parametrize("inside", [False, True])
def test_restore_takes_no_class_of_somebody_elses_away(inside: bool) -> None:
    model = accelerate(tiny())
    subclassed(model.blocks[0] if inside else model, extra=1)
    kinds = [type(m) for m in model.modules()]
    for undo in (restore, accelerate):
        with pytest.raises(
            UnsupportedModel, match=r"(0|the model) is a Mine, made from the class that accelerate gave"
        ):
            undo(model)
    assert [type(m) for m in model.modules()] == kinds


def test_a_round_trip_of_the_state() -> None:
    eager, other = tiny(), tiny()
    randomise(other, seed=5)
    model = accelerated(eager)
    with torch.no_grad():
        model(images(eager))
    model.load_state_dict(other.state_dict())
    check_model(model, other, images(eager))
    eager.load_state_dict(model.state_dict())
    check_model(model, eager, images(eager))


def test_a_copy_is_its_own() -> None:
    eager = tiny()
    model = accelerated(eager)
    twin = copy.deepcopy(model)
    randomise(twin, seed=3)
    check_model(model, eager, images(eager))
    check_model(twin, restore(copy.deepcopy(twin)), images(eager))
    assert type(model.blocks[0]).__name__ == "RaggedBlock", "restoring a copy leaves the model"


def test_lone_modules_anywhere() -> None:
    torch.manual_seed(0)

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Attention(12, 3, qkv_bias=True)
            self.mlp = timm.layers.Mlp(12, 20, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.attn(x))  # type: ignore[no-any-return]

    eager = Mine().eval()
    model = accelerated(eager)
    assert [type(m).__name__ for m in kernel_modules(model)] == ["RaggedAttention", "FusedMlp"]
    check_model(model, eager, torch.randn(2, 5, 12) + 3)
    with torch.no_grad():  # an MLP takes any number of dimensions
        torch.testing.assert_close(model.mlp(torch.ones(2, 3, 4, 12)), eager.mlp(torch.ones(2, 3, 4, 12)))
    assert type(restore(model).attn) is Attention


def test_a_torch_pruning_like_edit_of_timm() -> None:
    """Fewer heads, a head_dim of its own, a narrower MLP: timm's own attributes say so."""
    eager = tiny()
    attn, mlp = eager.blocks[0].attn, eager.blocks[0].mlp
    attn.num_heads, attn.head_dim, attn.attn_dim = 1, 9, 9
    attn.qkv, attn.proj = nn.Linear(24, 27), nn.Linear(9, 24)
    mlp.fc1, mlp.fc2 = nn.Linear(24, 31), nn.Linear(31, 24)
    check_model(accelerated(eager), eager, images(eager))


def test_nothing_to_accelerate() -> None:
    with pytest.raises(UnsupportedModel, match=r"Sequential: expected .* found none"):
        accelerate(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="a backend among auto, cpu, cuda, torch, got gpu"):
        accelerate(tiny(), backend="gpu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="check contents or versions, got maybe"):
        accelerate(tiny(), check="maybe")  # type: ignore[arg-type]


# -- what kernels cannot do runs as it did, and is named once ------------------------------------------------------


def hook_inside(model: Any) -> None:
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)


def lora_inside(model: Any) -> None:
    class Lora(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    lora = Lora(24, 24)
    lora.load_state_dict(model.blocks[0].attn.proj.state_dict())
    model.blocks[0].attn.proj = lora


def parametrize_inside(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def own_forward(model: Any) -> None:
    attn = model.blocks[0].attn
    attn.forward = lambda x, attn_mask=None, is_causal=False: 2 * Attention.forward(attn, x)


REFUSED = {
    "qk_norm": ({"qk_norm": True}, lambda m: None, "attn.q_norm is LayerNorm"),
    "swiglu": ({"mlp_layer": timm.layers.SwiGLU}, lambda m: None, "mlp is SwiGLU"),
    "hook_inside": ({}, hook_inside, "attn.qkv has a forward hook"),
    "lora": ({}, lora_inside, "attn.proj is Lora"),
    "weight_norm": ({}, parametrize_inside, "mlp.fc1 is ParametrizedLinear"),
    "own_forward": ({}, own_forward, "attn.forward is replaced"),
    "wide_heads": ({"embed_dim": 258}, lambda m: None, "attn has a head wider than 128"),
    "dropout": ({"proj_drop_rate": 0.3}, lambda m: m.train(), "drops at a rate of 0.3 in training"),
    "attention_dropout": ({"attn_drop_rate": 0.4}, lambda m: m.train(), "attn.attn_drop drops at a rate of 0.4"),
    "drop_path": ({"drop_path_rate": 0.9}, lambda m: m.train(), "drop_path1 drops at a rate of 0.9 in training"),
    "double": ({}, lambda m: m.double(), "torch.float64 on cpu: the kernels take fp32 on a CPU"),
    "half": ({}, lambda m: m.half(), "torch.float16 on cpu: the kernels take fp32 on a CPU"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_reference_path_is_named_once(case: str) -> None:
    fields, change, reason = REFUSED[case]
    model = accelerate(tiny(**fields))
    change(model)
    eager = restore(copy.deepcopy(model))
    if case == "own_forward":  # a copied closure would call the original's attention
        own_forward(eager)
    x = images(model).to(next(model.parameters()).dtype)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.manual_seed(1)
        got = model(x), model(x)
        torch.manual_seed(1)
        for ours in got:  # the blocks that are as they were run on kernels
            torch.testing.assert_close(ours, eager(x), rtol=1e-4, atol=1e-4)
    assert [reason in str(w.message) for w in told].count(True) == 1, [str(w.message) for w in told]
    assert len(told) == 1


def test_masks_and_autocast() -> None:
    eager = tiny()
    model, x = accelerated(eager), images(eager)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    for reason, call in {
        "attn_mask is given": lambda m: m(x, attn_mask=mask),
        "is_causal is set": lambda m: m(x, is_causal=True),
    }.items():
        with torch.no_grad(), pytest.warns(RuntimeWarning, match=reason):
            assert torch.equal(call(model), call(eager))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.warns(RuntimeWarning, match="autocast is on"):
        assert torch.equal(model(x), eager(x))
    check_model(model, eager, x)


def test_a_refusal_can_be_asked_for() -> None:
    block = accelerate(tiny()).blocks[0]
    tokens = torch.ones(1, 7, 24)
    with torch.no_grad():
        assert block.refusal(tokens) is None
        assert block.refusal(tokens, is_causal=True) == "is_causal is set"
        assert block.refusal(tokens[:0]) == "the batch is empty"
        with pytest.warns(RuntimeWarning, match="the batch is empty"):
            assert block(tokens[:0]).shape == (0, 7, 24)
    assert block.refusal(tokens) == GRADIENTS


def test_a_scale_that_pytorch_broadcasts() -> None:
    eager = tiny(init_values=0.1)
    eager.blocks[0].ls1.gamma = nn.Parameter(torch.full((1,), 0.3))
    model, x = accelerated(eager), images(eager)
    reason = r"ls1.gamma has the shape \(1,\), and its sublayer writes 24"
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=reason):
        model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_model(model, eager, x)


def test_a_replaced_forward_of_an_attention_need_not_know_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, x = nn.Sequential(Attention(12, 3)).eval(), torch.randn(2, 5, 12)
    model = accelerated(eager)
    monkeypatch.setattr(Attention, "forward", lambda self, x: self.proj(x))
    with torch.no_grad(), pytest.warns(RuntimeWarning, match=r"Attention\.forward is replaced, for all"):
        torch.testing.assert_close(model(x), eager(x))


def test_training_is_eager_training() -> None:
    eager = tiny().train()
    model, x = accelerated(eager), images(eager)
    for each in (eager, model):  # no warning: the module's mark would make it an error
        optimiser = torch.optim.AdamW(each.parameters(), lr=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            each(x).square().sum().backward()
            optimiser.step()
    for (name, ours), theirs in zip(model.named_parameters(), eager.parameters()):
        assert torch.equal(ours, theirs), name
    check_model(model.eval(), eager.eval(), x)


def test_forward_mode_and_torch_func() -> None:
    eager = tiny()
    model, x = accelerated(eager), images(eager)
    for each in (eager, model):
        each.requires_grad_(False)
        for block in each.blocks:
            block.attn.fused_attn = False  # PyTorch's fused attention has no forward-mode gradient
    with pytest.warns(RuntimeWarning, match="torch.func"):
        got = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(got[1], torch.func.jvp(eager, (x,), (torch.ones_like(x),))[1])
    with torch.no_grad():
        other = {name: p + 0.01 for name, p in eager.named_parameters()}
        torch.testing.assert_close(
            torch.func.functional_call(model, other, x), torch.func.functional_call(eager, other, x)
        )


def test_hooks_of_a_block_fire() -> None:
    eager = tiny()
    model, x, fired = copy.deepcopy(eager), images(eager), []
    early = model.blocks[0].register_forward_hook(lambda m, i, o: fired.append("early"))
    accelerate(model)
    model.blocks[1].register_forward_pre_hook(lambda m, i: fired.append("pre"))
    model.blocks[1].register_forward_hook(lambda m, i, o: o + 1)
    with torch.no_grad():
        model(x)
        assert fired == ["early", "pre"]
        early.remove()
        restore(model)(x)
    assert fired == ["early", "pre", "pre"], "hooks outlive restore, and their handles work"


def test_one_test_needs_the_kernels() -> None:
    assert CPU_KERNELS, "the C++ kernels are not built: the tests above compared references"
    made = packs.made
    eager = tiny()
    check_model(accelerated(eager), eager, images(eager))
    assert packs.made == made + 1


def test_a_scale_of_zero_is_refused_and_not_taken_for_none() -> None:
    with pytest.raises(ValueError, match="attn_scale"):
        RaggedBlock(8, [4], [4], 8, attn_scale=0.0)
    with pytest.raises(ValueError, match="attn_scale"):
        RaggedAttention(8, [4], [4], scale=0.0)
    assert RaggedBlock(8, [4], [4], 8).attn.scale == 0.5
    assert RaggedBlock(8, [], [], 8).attn.qkv is None
