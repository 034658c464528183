"""A masked timm ViT and its compact model compute the same, whatever is masked; ViT-Slim's forward pass included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from prunevit.errors import InputError, UnsupportedModel
from prunevit.interop import from_masks, vit_slim_masks

HEADS, DIM, HIDDEN = 3, 8, 40


def timm_vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=12, patch_size=4, num_classes=5, embed_dim=HEADS * DIM, depth=2, num_heads=HEADS,
        mlp_ratio=HIDDEN / (HEADS * DIM), **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
            )
    return model.eval()


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(1)) + 3


def agree(got: nn.Module, want: nn.Module) -> None:
    x = images()
    with torch.no_grad():
        eager, truth, ours = want(x), want.double()(x.double()), got(x)
    error = (ours.double() - truth).abs().max()
    least = (eager.double() - truth).abs().max()
    assert error <= 2 * least + 16 * torch.finfo(torch.float32).eps * truth.abs().max()


class SlimAttention(nn.Module):
    """ViT-Slim's attention after its search: queries, keys and values times one mask (its layers.py)."""

    def __init__(self, attn: Any, mask: Tensor) -> None:
        super().__init__()
        self.qkv, self.proj, self.scale, self.heads = attn.qkv, attn.proj, attn.scale, attn.num_heads
        self.is_searched, self.searched_zeta = True, mask
        self.searched_patch_zeta = torch.ones(1, 10, 1)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        b, n, _e = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4) * self.searched_zeta
        attention = (qkv[0] @ qkv[1].transpose(-2, -1) * self.scale).softmax(-1)
        return self.proj((attention @ qkv[2]).transpose(1, 2).reshape(b, n, -1))  # type: ignore[no-any-return]


class SlimMlp(nn.Module):
    def __init__(self, mlp: Any, mask: Tensor) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = mlp.fc1, mlp.act, mlp.fc2
        self.is_searched, self.searched_zeta = True, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)) * self.searched_zeta)  # type: ignore[no-any-return]


def slim(model: VisionTransformer, attention: list[Tensor], hidden: list[Tensor]) -> nn.Module:
    searched: Any = copy.deepcopy(model)
    for block, heads, neurons in zip(searched.blocks, attention, hidden):
        block.attn, block.mlp = SlimAttention(block.attn, heads), SlimMlp(block.mlp, neurons)
    return searched  # type: ignore[no-any-return]


def ones_and_zeros(*shape: int, seed: int, share: float = 0.5) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > share).float()


@pytest.mark.parametrize(
    "shape", [(1, 1, HEADS, 1, DIM), (1, 1, HEADS, 1, 1), (1, 1, 1, 1, DIM)], ids=["each", "heads", "uniform"]
)
def test_vit_slim_computes_what_its_compact_model_computes(shape: tuple[int, ...]) -> None:
    model = timm_vit(qkv_bias=True)
    attention = [ones_and_zeros(*shape, seed=i) for i in (3, 4)]
    hidden = [ones_and_zeros(1, 1, HIDDEN, seed=i) for i in (5, 6)]
    searched = slim(model, attention, hidden)
    compact = from_masks(model, vit_slim_masks(searched))
    assert compact.spec.params() < sum(p.numel() for p in model.parameters())
    agree(compact, searched)
    assert compact.plan is not None


def test_everything_masked_leaves_the_output_biases() -> None:
    model = timm_vit()
    masks = [torch.zeros(1, 1, HEADS, 1, DIM), torch.ones(1, 1, HEADS, 1, DIM)]
    hidden = [torch.zeros(1, 1, HIDDEN)] * 2
    compact = from_masks(model, vit_slim_masks(slim(model, masks, hidden)))
    assert [(block.num_heads, block.mlp_dim) for block in compact.spec.blocks] == [(0, 0), (3, 0)]
    agree(compact, slim(model, masks, hidden))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"init_values": 0.1}, {"act_layer": nn.ReLU}], ids=str)
def test_weight_masks_leave_constants_behind(options: dict[str, Any]) -> None:
    model = timm_vit(**options)
    qk, v, mlp = (
        ones_and_zeros(HEADS, DIM, seed=1),
        ones_and_zeros(HEADS, DIM, seed=2),
        ones_and_zeros(HIDDEN, seed=3),
    )
    qk[1] = 0  # a head that only averages its values
    v[2] = 0  # one that adds a constant
    masked: Any = copy.deepcopy(model)
    with torch.no_grad():
        for block in masked.blocks:
            block.attn.qkv.weight *= torch.cat([qk.flatten(), qk.flatten(), v.flatten()])[:, None]
            block.mlp.fc1.weight *= mlp[:, None]
    named = {
        f"blocks.{i}.{part}": mask for i in (0, 1) for part, mask in (("attn.qk", qk), ("attn.v", v), ("mlp", mlp))
    }
    compact = from_masks(model, named, on="weights")
    assert compact.spec.blocks[0].num_heads == 2
    assert compact.spec.blocks[0].mlp_dim == int(mlp.sum())
    agree(compact, masked)


def test_weight_masks_without_a_bias_to_take_them_are_refused() -> None:
    model = timm_vit(proj_bias=False)
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.attn\.proj has no bias"):
        from_masks(model, {"blocks.0.attn.v": torch.zeros(HEADS)}, on="weights")


def test_query_key_and_value_masks_may_differ() -> None:
    model = timm_vit()
    qk, v = ones_and_zeros(HEADS, DIM, seed=7), ones_and_zeros(HEADS, DIM, seed=8, share=0.8)
    qk[0], v[0] = 0, 1
    searched: Any = copy.deepcopy(model)

    def masked(module: Any, _: Any, out: Tensor) -> Tensor:
        return out * torch.cat([qk.flatten(), qk.flatten(), v.flatten()])

    for block in searched.blocks:
        block.attn.qkv.register_forward_hook(masked)
    named = {f"blocks.{i}.attn.{part}": mask for i in (0, 1) for part, mask in (("qk", qk), ("v", v))}
    compact = from_masks(model, named)
    assert compact.spec.blocks[0].qk_dims[0] == 1
    agree(compact, searched.double().float())


def test_several_masks_of_one_attention_hold_together() -> None:
    both, qk = ones_and_zeros(3, 8, seed=1), ones_and_zeros(3, 8, seed=2)
    both[1] = 0
    v = ones_and_zeros(3, 8, seed=3)
    apart = {"blocks.0.attn.qk": both * qk, "blocks.0.attn.v": both * v}
    together = {"blocks.0.attn": both, "blocks.0.attn.qk": qk, "blocks.0.attn.v": v}
    agree(from_masks(timm_vit(), together), from_masks(timm_vit(), apart))
    del apart["blocks.0.attn.v"], together["blocks.0.attn.v"]
    agree(from_masks(timm_vit(), together), from_masks(timm_vit(), {**apart, "blocks.0.attn.v": both}))


def test_a_model_is_left_as_it_is() -> None:
    model = timm_vit()
    before = copy.deepcopy(model.state_dict())
    from_masks(model, {"blocks.0.mlp": ones_and_zeros(HIDDEN, seed=1)}, on="weights")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"blocks.9.mlp": torch.ones(HIDDEN)}, "masks named"),
        ({"blocks.0.norm1": torch.ones(24)}, "masks named"),
        ({"blocks.0.mlp": torch.ones(7)}, "40 neurons, got 7"),
        ({"blocks.0.mlp": torch.full((HIDDEN,), 0.5)}, "zeros and ones"),
        ({"blocks.0.attn": torch.ones(5, DIM)}, r"of shape \[3, 8\]"),
        ({"blocks.0.attn": [1, 0, 1]}, "as a tensor"),
    ],
    ids=["no_such_block", "norm", "wrong_width", "half", "five_heads", "list"],
)
def test_refuses_other_masks(masks: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_masks(timm_vit(), masks)


def test_the_provenance_says_where_the_widths_come_from() -> None:
    model = timm_vit()
    model.pretrained_cfg = {"architecture": "vit_tiny_patch16_224"}
    made = from_masks(model, {"blocks.0.mlp": ones_and_zeros(HIDDEN, seed=1)})
    entry = {"method": "masks", "on": "activations"}
    assert made.provenance == {"base_model": "vit_tiny_patch16_224", "method": "masks", "prunings": [entry]}
    again = from_masks(made, {"blocks.1.mlp": ones_and_zeros(HIDDEN, seed=1)})
    assert (again.provenance["method"], again.provenance["prunings"]) == ("masks+masks", [entry, entry])


def test_refuses_an_unfinished_search() -> None:
    model = timm_vit()
    with pytest.raises(UnsupportedModel, match="searched_zeta"):
        vit_slim_masks(model)
    searched: Any = slim(model, [torch.ones(1, 1, HEADS, 1, DIM)] * 2, [torch.ones(1, 1, HIDDEN)] * 2)
    searched.blocks[1].attn.searched_patch_zeta[0, 4] = 0
    with pytest.raises(UnsupportedModel, match=r"blocks\.1\.attn\.searched_patch_zeta masks patches"):
        vit_slim_masks(searched)
    searched.blocks[0].mlp.is_searched = False
    with pytest.raises(UnsupportedModel, match=r"blocks\.0\.mlp\.is_searched"):
        vit_slim_masks(searched)
