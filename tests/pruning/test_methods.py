"""Every method by its name, from prune() to the runtime."""

from __future__ import annotations

import logging
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from prunevit.errors import PruningError
from prunevit.models import PrunedViT
from prunevit.pruning import METHODS, Plan, Ranking, Recipe, accuracy, groups_of, prune, recover
from prunevit.pruning.scorers import SCORERS
from prunevit.runtime import Runtime
from prunevit.spec import ViTSpec
from tests.specs import block, random_images, random_model, vit

SPEC = vit(*[block((8,) * 3, (8,) * 3)] * 4, img_size=(24, 32))
MODEL = random_model(SPEC)
IMAGES = random_images(SPEC, 12)
DATA = [(IMAGES, MODEL(IMAGES).argmax(-1))]


@pytest.mark.parametrize("method", METHODS)
def test_masked_dense_is_compact_is_runtime(method: str) -> None:
    options: dict[str, object] = {"validation": DATA, "tau": 0.5, "scorer": "taylor"} if method == "auto" else {}
    small = prune(MODEL, method, {"macs": "70%"}, DATA, **options).eval()
    assert 0.67 <= small.spec.macs() / SPEC.macs() <= 0.7
    assert sum(p.numel() for p in small.parameters()) == small.spec.params()
    plan = Plan.from_dict(small.plan)
    with torch.no_grad():
        want = small(IMAGES)
        torch.testing.assert_close(plan.mask(MODEL)(IMAGES), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plan.lift(small)(IMAGES), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(Runtime(small, device="cpu")(IMAGES), want, rtol=1e-4, atol=1e-4)
    again = prune(MODEL, method, {"macs": "70%"}, DATA, **options)
    assert again.plan == small.plan


ZEROED = {"qk": (1, 6), "v": (0, 5), "mlp": (2, 3, 11, 17, 20, 23)}  # a quarter of each group


def model_with_dead_units() -> PrunedViT:
    model = random_model(SPEC).double()
    with torch.no_grad():
        for module in model.blocks:
            qkv, fc1 = module.attn.qkv, module.mlp.fc1
            rows = [
                24 * part + 8 * h + u
                for part, kind in enumerate(("qk", "qk", "v"))
                for h in range(3)
                for u in ZEROED[kind]
            ]
            columns = [8 * h + u for h in range(3) for u in ZEROED["v"]]
            qkv.weight[rows], qkv.bias[rows], module.attn.proj.weight[:, columns] = 0, 0, 0
            neurons = list(ZEROED["mlp"])
            fc1.weight[neurons], fc1.bias[neurons], module.mlp.fc2.weight[:, neurons] = 0, 0, 0
    return model


@pytest.mark.parametrize("method", ["magnitude", "taylor", "snp", "gohsp"])
def test_dead_units_go_first_and_their_going_changes_nothing(method: str) -> None:
    model, images = model_with_dead_units(), IMAGES.double()
    small = prune(model, method, None, DATA, groups=("qk", "v", "mlp"), pruning_ratio=0.25)
    for kept in Plan.from_dict(small.plan).blocks:
        assert all(set(pairs).isdisjoint(ZEROED["qk"]) for pairs in kept.qk)
        assert all(set(neurons).isdisjoint(ZEROED["v"]) for neurons in kept.v)
        assert set(kept.mlp).isdisjoint(ZEROED["mlp"])
    assert small.spec.blocks[0].qk_dims == (6, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(small(images), model(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_a_dead_head_goes_first_and_its_going_changes_nothing(method: str) -> None:
    model = random_model(SPEC).double()
    with torch.no_grad():
        for i, module in enumerate(model.blocks):
            dead = slice(8 * (i % 3), 8 * (i % 3) + 8)
            module.attn.proj.weight[:, dead] = 0
            module.attn.qkv.weight[[*range(dead.start, dead.stop)]] = 0
            module.attn.qkv.weight[[*range(24 + dead.start, 24 + dead.stop)]] = 0
            module.attn.qkv.weight[[*range(48 + dead.start, 48 + dead.stop)]] = 0
    small = prune(model, method, None, DATA, groups=("head",), pruning_ratio=1 / 3)
    assert [sorted({0, 1, 2} - set(kept.heads)) for kept in Plan.from_dict(small.plan).blocks] == [[0], [1], [2], [0]]
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES.double()), model(IMAGES.double()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "snp", "gohsp"])
def test_permuting_neurons_permutes_scores(method: str) -> None:
    model = random_model(SPEC).double()
    groups = groups_of(SPEC, ("mlp",))
    scorer = SCORERS[method]()
    before = scorer.score(model, groups, DATA, 0)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for module in model.blocks:
            fc1, fc2 = module.mlp.fc1, module.mlp.fc2
            fc1.weight.copy_(fc1.weight[order])
            fc1.bias.copy_(fc1.bias[order])
            fc2.weight.copy_(fc2.weight[:, order])
    after = scorer.score(model, groups, DATA, 0)
    for group in groups:
        torch.testing.assert_close(after[group], before[group][order], rtol=1e-6, atol=1e-9)


def test_latency_is_a_budget_for_whoever_measures_it() -> None:
    asked: list[ViTSpec] = []

    def measure(spec: ViTSpec) -> float:
        asked.append(spec)
        return 1.0 + spec.macs() / 1e6 + 0.01 * sum(block.num_heads for block in spec.blocks)

    small = prune(
        MODEL, "magnitude", {"latency": "80%", "params": "95%"}, cost={"latency": measure}, groups=("head", "mlp")
    )
    assert measure(small.spec) <= 0.8 * measure(SPEC)
    assert len(asked) == len(set(asked)) + 2 < 40, "a measurement takes seconds"


@pytest.mark.parametrize("method", METHODS)
def test_the_callers_chance_is_left_alone(method: str) -> None:
    options: dict[str, object] = {"validation": DATA, "tau": 1.0, "scorer": "magnitude"} if method == "auto" else {}
    before = torch.random.get_rng_state()
    prune(MODEL, method, {"macs": "80%"}, DATA, **options)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("magnitude", {"seed": -1}, "a seed of at least 0, got -1"),
        ("magnitude", {"seed": 0.5}, "a seed of at least 0"),
        ("magnitude:", {}, "kinds of group .* got ''"),
        ("magnitude", {"constraints": "80%"}, r'constraints such as .* "45%"}, got .80%'),
        (["magnitude"], {"constraints": ["80%"]}, "constraints such as"),
        (["magnitude"], {"constraints": []}, "constraints such as"),
        (None, {}, "a method out of .* got None"),
        ("cp-vit:mlp", {}, "that cp-vit prunes, head .*got mlp"),
        ("cp-vit", {"groups": ("head", "mlp")}, "that cp-vit prunes, head .*got head, mlp"),
        ("cp-vit", {"ignored_layers": ["blocks.9.nope"]}, "a pattern of addresses .*head.* got 'blocks.9.nope'"),
        ("cp-vit", {"isomorphic": True}, "that cp-vit goes by, .* got isomorphic"),
        ("evit", {"round_to": 7}, "that evit goes by, out of pruning_ratio, got round_to"),
        ("evit:head", {}, "that evit prunes, none .*got head"),
        (["cp-vit", "evit"], {"normalizer": None}, "that cp-vit or evit goes by, .* got normalizer"),
        (["magnitude:mlp"], {"groups": ("qk",)}, "groups= where a method does not name its own, got qk"),
        ([3], {}, "a method out of .* got 3"),
        ("magnitude", {"rounds": 2.5}, "at least one round, got 2.5"),
        ("magnitude", {"recovery": True}, "options of recover, got True"),
        ("magnitude", {"recovery": {"teacher": MODEL}}, "options of recover out of .* got teacher"),
        ("gohsp", {"recipe": {"penalty": 1}}, "options of recover out of .* got penalty"),
        ("gohsp", {"recipe": {"epochs": 3}}, "epochs by stage_epochs and finetune_epochs, got a recipe"),
        ("auto", {"recipe": {"epochs": 3}}, "epochs by finetune_epochs, got a recipe with epochs"),
        ("auto", {"recipe": {"state": "file"}}, "options of recover out of .* got state"),
        ("snp", {"data": IMAGES}, "batches, such as a DataLoader, got Tensor"),
        ("gohsp", {"finetune_epochs": -1}, "finetune_epochs of at least 0, got -1"),
        ("auto", {"finetune_epochs": -1}, "finetune_epochs of at least 0, got -1"),
        ("gohsp", {"stage_epochs": 0}, "stage_epochs of at least 1, got 0"),
        ("gohsp", {"rho": -1.0}, "rho of at least 0, got -1.0"),
        *((name, {"images": 0}, "images of at least 1, got 0") for name in ("snp", "taylor", "gohsp", "cp-vit")),
        ("cp-vit", {"start": -5}, "a start after the first layer, .* got -5"),
        ("magnitude", {"recovery": {"lr": float("inf")}}, "a finite lr, got inf"),
        ("auto", {"validation": iter(DATA)}, "validation= of batches to go through again and again"),
        ("magnitude", {"train": iter(DATA), "recovery": {"epochs": 1}}, "train= of batches to go through again"),
        ("cp-vit", {"heads": "False"}, "heads to be bool, got 'False'"),
        ("evit", {"fuse": "no"}, "fuse to be bool, got 'no'"),
        ("magnitude", {"rescale_norms": "False"}, "rescale_norms to be bool, got 'False'"),
        ("magnitude", {"isomorphic": 1}, "isomorphic to be .*bool.*, got 1"),
        ("snp", {"energy": ".9"}, "energy to be float, got '.9'"),
        ("magnitude", {"pruning_ratio": "0.5"}, "pruning_ratio to be .*, got '0.5'"),
        ("magnitude", {"pruning_ratio": True}, "pruning_ratio to be .*, got True"),
        ("magnitude", {"recovery": {"lr": ".001"}}, "lr to be float, got '.001'"),
        ("magnitude", {"recovery": {"amp": "False"}}, "amp to be .*bool.*, got 'False'"),
        ("magnitude", {"groups": 3}, "kinds of group out of head, .* got 3"),
        ("auto", {"mhsa": 3, "validation": DATA}, "kinds of group out of head, .* got 3"),
        ("snp", {"data": 7}, "batches, such as a DataLoader, got int"),
    ],
)
def test_what_does_not_fit_is_named(method: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PruningError, match=reason):
        prune(MODEL, **{"method": method, "constraints": {"macs": "80%"}, "data": DATA, **options})


IMAGE, LABEL = DATA[0]
WRONG = {
    "another_size": ((IMAGE[..., :16], LABEL), r"images \[B, 3, 24, 32\], got \[12, 3, 24, 16\]"),
    "other_channels": ((IMAGE[:, :1], LABEL), r"images \[B, 3, 24, 32\]"),
    "one_image": (IMAGE[0], r"images \[B, 3, 24, 32\]"),
    "a_dict": ({"image": IMAGE, "label": LABEL}, r"batches of \(images, labels\), got dict"),
    "numbers": (7, r"batches of \(images, labels\), got int"),
}
WRONG_LABELS = {
    "no_labels": ((IMAGE,), "got images alone"),
    "labels_of_another_model": ((IMAGE, LABEL + 7), r"an integer from 0 to 6 .* with \d+ to \d+"),
    "labels_below_0": ((IMAGE, LABEL - 7), "an integer from 0 to 6"),
    "too_few_labels": ((IMAGE, LABEL[:3]), "each of 12 images"),
    "float_labels": ((IMAGE, LABEL.float()), "an integer from 0 to 6"),
}


@pytest.mark.parametrize("name", [*WRONG, *WRONG_LABELS])
def test_a_batch_that_does_not_fit_is_named(name: str) -> None:
    batch, reason = {**WRONG, **WRONG_LABELS}[name]
    data: Any = [batch]
    with pytest.raises(PruningError, match=reason):
        prune(MODEL, "taylor", {"macs": "80%"}, data)
    with pytest.raises(PruningError, match=reason):
        recover(prune(MODEL, "magnitude", {"macs": "80%"}), data, epochs=1)
    with pytest.raises(PruningError, match=reason):
        accuracy(MODEL, data)
    if name in WRONG:
        with pytest.raises(PruningError, match=reason):
            prune(MODEL, "snp", {"macs": "80%"}, data)
    else:
        prune(MODEL, "snp", {"macs": "80%"}, data)  # which looks at no labels


def test_what_is_no_number_is_named() -> None:
    with pytest.raises(PruningError, match="finite images"):
        prune(MODEL, "snp", {"macs": "80%"}, [IMAGES * torch.nan])
    spoilt = random_model(SPEC)
    with torch.no_grad():
        spoilt.blocks[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(PruningError, match=r"finite weights in blocks\.1\.mlp\.fc1\.weight"):
        prune(spoilt, "snp", {"macs": "80%"}, DATA)


def test_a_teacher_of_other_classes_is_named() -> None:
    with pytest.raises(PruningError, match="a teacher of 7 classes, as the model has, got 3"):
        recover(random_model(SPEC), DATA, teacher=random_model(SPEC.replace(num_classes=3)), epochs=1)


def test_in_inference_mode_too_what_comes_out_can_be_trained() -> None:
    with torch.inference_mode():
        small = prune(MODEL, "taylor", {"macs": "80%"}, [(random_images(SPEC, 4), torch.arange(4))])
        recover(small, DATA, epochs=1)
    small(IMAGES).sum().backward()
    assert small.pos_embed.grad is not None


@pytest.mark.parametrize("of", ["every method", "`recover`", *(f"`{name}`" for name in METHODS)])
def test_the_page_has_every_option_with_its_default(of: str) -> None:
    kind: Any = {"every method": Ranking, "`recover`": Recipe}.get(of) or METHODS[of.strip("`")]
    defaults = [(f.name, f.default_factory() if f.default is MISSING else f.default) for f in fields(kind)]  # type: ignore[operator]
    said = ", ".join(f"`{name}={default!r}`" for name, default in defaults) or "–"
    page = Path(__file__).parents[2] / "docs/methods.md"
    kinds = ", ".join(f"`{kind}`" for kind in METHODS[of.strip("`")].groups) if of.strip("`") in METHODS else ""
    assert f"| {of} | {said} | {kinds}" in page.read_text("utf-8")


def test_features_that_become_narrower_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    backbone = random_model(SPEC.replace(num_classes=0))
    with caplog.at_level(logging.WARNING, "prunevit"):
        prune(backbone, "snp", {"macs": "80%"}, DATA, groups=("qk", "v", "mlp"))
        assert not caplog.text
        small = prune(backbone, "snp", {"macs": "80%"}, DATA)
    assert f"features are {small.spec.embed_dim} wide" in caplog.text
