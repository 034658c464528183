"""``timm.create_model`` on a checkpoint directory: as saved, and with timm's own overrides."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError
from timm.data import resolve_data_config
from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg
from timm.models._hub import _parse_model_cfg, save_for_hf

import prunevit.models.registry as registry
from prunevit import checkpoint
from prunevit.errors import CheckpointError, SpecError
from prunevit.models import PrunedViT
from prunevit.models.config import pretrained_cfg_of
from prunevit.models.from_timm import from_timm
from prunevit.pruning import Plan, prune
from tests.specs import SPECS, random_images, random_model


def created(directory: Path, **overrides: Any) -> Any:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **overrides).eval()


@pytest.mark.parametrize("name", SPECS)
def test_timm_builds_what_was_saved(name: str, tmp_path: Path) -> None:
    spec = SPECS[name]
    model, images = random_model(spec), random_images(spec)
    again = created(checkpoint.save(model, tmp_path / "vit"))
    assert isinstance(again, PrunedViT)
    assert again.spec == spec
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize("name", ["one_head_13_by_12", "distilled", "no_classes"])
def test_another_number_of_classes(name: str, tmp_path: Path) -> None:
    model, images = random_model(SPECS[name]), random_images(SPECS[name])
    directory = checkpoint.save(model, tmp_path / "vit")
    again = created(directory, num_classes=5)
    assert again.spec == model.spec.replace(num_classes=5)
    with torch.no_grad():
        assert again(images).shape == (3, 5)
        assert torch.equal(again.forward_features(images), model.forward_features(images))
        assert created(directory, num_classes=0)(images).shape == (3, model.embed_dim)


def test_another_number_of_channels(tmp_path: Path) -> None:
    model = random_model(SPECS["uniform"])
    again = created(checkpoint.save(model, tmp_path / "vit"), in_chans=1)
    kernel = again.patch_embed.proj.weight
    torch.testing.assert_close(kernel, model.patch_embed.proj.weight.sum(dim=1, keepdim=True))
    assert again.spec.in_chans == 1


@pytest.mark.parametrize("name", ["registers", "registers_not_embedded", "image_with_a_remainder"])
def test_another_image_size(name: str, tmp_path: Path) -> None:
    model = random_model(SPECS[name])
    again = created(checkpoint.save(model, tmp_path / "vit"), img_size=24)
    assert again.spec.grid_size == (6, 6)
    assert again(torch.randn(2, 3, 24, 24)).shape == (2, 7)
    prefix = 0 if model.spec.no_embed_class else model.num_prefix_tokens
    want = resample_abs_pos_embed(model.pos_embed, [6, 6], list(model.spec.grid_size), prefix)
    torch.testing.assert_close(again.pos_embed, want)


def test_an_image_too_small_for_the_tokens_kept_is_refused(tmp_path: Path) -> None:
    directory = checkpoint.save(random_model(SPECS["select_before_mlp"]), tmp_path / "vit")
    with pytest.raises(SpecError, match=r"blocks\.1\.select\.keep"):
        created(directory, img_size=8)


def test_another_pooling(tmp_path: Path) -> None:
    images = random_images(SPECS["attention_pool"])
    directory = checkpoint.save(random_model(SPECS["attention_pool"]), tmp_path / "vit")
    again = created(directory, global_pool="avg")
    assert (again.spec.attn_pool, again(images).shape) == (None, (3, 7))


def test_dropout_rates_and_dynamic_sizes(tmp_path: Path) -> None:
    directory = checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    again = created(directory, drop_path_rate=0.2, drop_rate=0.1, dynamic_img_size=True)
    assert again.head_drop.p == 0.1
    assert again.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert again(torch.randn(1, 3, 20, 8)).shape == (1, 7)


def test_features_only(tmp_path: Path) -> None:
    spec = SPECS["registers"]
    model, images = random_model(spec), random_images(spec)
    directory = checkpoint.save(model, tmp_path / "vit")
    features = created(directory, features_only=True, out_indices=[0, 1])
    with torch.no_grad():
        want = model.forward_intermediates(images, intermediates_only=True)
        for got, expected in zip(features(images), want, strict=True):
            assert torch.equal(got, expected)
    assert features.feature_info.channels() == [29, 29]
    assert [f.shape for f in created(directory, features_only=True)(images)] == [(3, 29, 3, 4)] * 2


def test_no_overrides_no_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = checkpoint.save(random_model(SPECS["distilled"]), tmp_path / "vit")
    with caplog.at_level(logging.WARNING, logger="timm"):
        model = created(directory)
    assert caplog.records == []
    assert model.pretrained_cfg["classifier"] == ["head", "head_dist"]
    assert model.pretrained_cfg["first_conv"] == "patch_embed.proj"
    assert tuple(resolve_data_config(model=model)["input_size"]) == (3, 12, 16)


def test_plan_and_provenance_come_with_the_weights(tmp_path: Path) -> None:
    small = prune(random_model(SPECS["uniform"]), "magnitude", {"macs": "60%"})
    directory = checkpoint.save(small, tmp_path / "vit")
    loaded, images = checkpoint.load(directory), random_images(SPECS["uniform"])
    for again in (created(directory), created(directory, num_classes=3), created(directory, features_only=True).model):
        assert again.plan == loaded.plan == json.loads(json.dumps(small.plan))
        assert again.provenance == loaded.provenance
    again = created(directory)
    with torch.no_grad():
        torch.testing.assert_close(Plan.from_dict(again.plan).lift(again)(images), small(images), rtol=1e-4, atol=1e-4)
    assert timm.create_model(f"local-dir:{directory}").plan is None, "other weights have no plan"
    (directory / "plan.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"plan\.json: expected a JSON object"):
        created(directory)


@pytest.mark.parametrize("when", ["read_json", "check_file", "read_plan", "build_model_with_cfg"])
def test_a_save_meanwhile_mixes_nothing(when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, later = random_model(SPECS["uniform"], seed=1), random_model(SPECS["uniform"], seed=2)
    for saved, seed in ((model, 1), (later, 2)):
        saved.plan, saved.provenance = {"seed": seed}, {"seed": seed}
    directory = checkpoint.save(model, tmp_path / "vit")
    inner = getattr(registry, when)

    def busy(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(registry, when, inner)
        result = inner(*args, **kwargs)
        checkpoint.save(later, directory)
        return result

    monkeypatch.setattr(registry, when, busy)
    again = created(directory)
    assert (again.plan, again.provenance["seed"]) == ({"seed": 2}, 2)
    assert torch.equal(again.pos_embed, later.pos_embed)


def test_half_precision_weights_load_into_fp32(tmp_path: Path) -> None:
    directory = checkpoint.save(random_model(SPECS["uniform"]).to(torch.bfloat16), tmp_path / "vit")
    assert {p.dtype for p in created(directory).parameters()} == {torch.float32}


def test_without_weights() -> None:
    model: Any = timm.create_model("prunevit", spec=SPECS["evit"].to_dict())
    assert model.spec == SPECS["evit"]
    assert model.pretrained_cfg["input_size"] == [3, 12, 16]
    with pytest.raises(SpecError, match="model_args"):
        timm.create_model("prunevit")


def test_the_hub_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``hf-hub:`` goes, with the download taken out: config parsed by timm, weights asked for by their safe name."""
    model, images = random_model(SPECS["uniform"]), random_images(SPECS["uniform"])
    model.provenance = {"base_model": "uniform"}
    directory = checkpoint.save(model, tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    cfg, name, args = _parse_model_cfg(config, {"hf_hub_id": "someone/vit", "source": "hf-hub"})
    assert name == "prunevit"
    assert PretrainedCfg(**cfg).hf_hub_id == "someone/vit"
    asked = []

    def download(hub_id: str, filename: str, **_: Any) -> dict[str, torch.Tensor]:
        asked.append((hub_id, filename))
        return dict(model.state_dict())

    def file(hub_id: str, filename: str, cache_dir: object) -> str:
        asked.append((hub_id, filename))
        if filename == "plan.json":
            raise EntryNotFoundError("no such file")
        return str(directory / filename)

    monkeypatch.setattr(registry, "download_from_hf", file)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    monkeypatch.setattr("timm.models._builder.has_hf_hub", lambda necessary: True)
    again: Any = timm.create_model(name, pretrained=True, pretrained_cfg=cfg, **args)
    assert asked == [
        ("someone/vit", name) for name in ("config.json", "model.safetensors", "plan.json", "model.safetensors")
    ]
    assert again.provenance["base_model"] == "uniform"
    assert again.plan is None
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model(images))


def test_unknown_fields_of_a_later_timm_are_left_out(tmp_path: Path) -> None:
    directory = checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config["pretrained_cfg"]["of_a_later_timm"] = 1
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    assert created(directory).num_classes == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(num_classes=5), "num_classes: expected 7 as the spec has, got 5"),
        (lambda c: c["model_args"].update(num_classes=5), r"model_args\.num_classes: expected nothing but the spec"),
        (lambda c: c["model_args"].update(features_only=True), r"model_args\.features_only: expected nothing but"),
        (lambda c: c["pretrained_cfg"].update(input_size=[3, 24, 24]), r"pretrained_cfg\.input_size"),
        (lambda c: c["pretrained_cfg"].update(mean="0.5"), r"pretrained_cfg\.mean"),
        (lambda c: c.update(prunevit="x"), "prunevit: expected an object"),
    ],
)
def test_what_load_refuses_is_refused(change: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    directory = checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    change(config)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    for read in (created, checkpoint.load):
        with pytest.raises(CheckpointError, match=message):
            read(directory)


def test_the_file_does_not_tell_timm_how_to_load(tmp_path: Path) -> None:
    model, images = random_model(SPECS["uniform"]), random_images(SPECS["uniform"])
    directory = checkpoint.save(model, tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    hostile = {"custom_load": True, "first_conv": "nope", "classifier": 7, "label_offset": 1, "state_dict": {"a": 1}}
    config["pretrained_cfg"].update(hostile)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    with torch.no_grad():
        assert torch.equal(created(directory)(images), model(images))


# -- timm's own export


CHANGES: dict[str, Callable[[Any], object]] = {
    "as_it_was": lambda model: None,
    "classes": lambda model: model.reset_classifier(11),
    "pooling": lambda model: model.reset_classifier(7, "avg"),
    "no_pooling": lambda model: model.reset_classifier(0, ""),
    "image_size": lambda model: model.set_input_size(24),
    "patch_size": lambda model: model.set_input_size(patch_size=(2, 2)),
    "depth": lambda model: model.prune_intermediate_layers([0], prune_head=False),
}


@pytest.mark.parametrize("read", [created, checkpoint.load])
@pytest.mark.parametrize("change", CHANGES)
def test_timms_export_is_read_back(change: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    model = read(checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit"))
    CHANGES[change](model)
    save_for_hf(model, tmp_path / "out", safe_serialization=True)
    images = random_images(model.spec)
    for again in (created(tmp_path / "out"), checkpoint.load(tmp_path / "out")):
        assert again.spec == model.spec
        with torch.no_grad():
            assert torch.equal(again(images), model(images))


def test_labels_that_timms_export_is_given_are_read_back(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(7)]
    labels = {"label_names": names, "label_descriptions": dict.fromkeys(names, "one of seven")}
    model = checkpoint.load(checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit"))
    save_for_hf(model, tmp_path / "out", model_config=labels, safe_serialization=True)
    for again in (created(tmp_path / "out"), checkpoint.load(tmp_path / "out")):
        assert {name: again.pretrained_cfg[name] for name in labels} == labels
    config = json.loads((tmp_path / "out/config.json").read_text("utf-8"))
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "label_names": [1]}), "utf-8")
    with pytest.raises(CheckpointError, match=r"label_names"):
        checkpoint.load(tmp_path / "out")


def test_timms_export_of_a_converted_model(tmp_path: Path) -> None:
    model = from_timm(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)).eval()
    save_for_hf(model, tmp_path / "out", safe_serialization=True)
    for again in (created(tmp_path / "out"), checkpoint.load(tmp_path / "out")):
        assert again.spec == model.spec


def test_a_pickle_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SPECS["uniform"])
    directory = checkpoint.save(model, tmp_path / "vit")
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a file"):
        created(directory)


def test_a_spec_larger_than_its_file_allocates_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config["model_args"]["spec"]["blocks"][0]["mlp_dim"] = 2**18
    (directory / "config.json").write_text(json.dumps(config), "utf-8")
    monkeypatch.setattr(registry, "_build", lambda *_, **__: pytest.fail("the model was built"))
    with pytest.raises(CheckpointError, match="expected at least"):
        created(directory)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = checkpoint.save(random_model(SPECS["uniform"]), tmp_path / "vit")
    state = load_file(directory / "model.safetensors")
    state["blocks.1.mlp.fc2.bias"][3] = float("nan")
    save_file(state, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc2\.bias: expected finite"):
        created(directory)


def test_labels_and_preprocessing_are_kept() -> None:
    base = {
        "url": "https://example.com/weights.bin",
        "hf_hub_id": "timm/",
        "custom_load": True,
        "tag": "fb_in1k",
        "num_classes": 7,
        "crop_pct": 0.9,
        "mean": (0.5, 0.5, 0.5),
        "label_names": ("cat",) * 7,
        "test_input_size": (3, 288, 288),
    }
    cfg = pretrained_cfg_of(SPECS["uniform"], base)
    assert (cfg["crop_pct"], cfg["mean"], cfg["label_names"]) == (0.9, (0.5, 0.5, 0.5), ("cat",) * 7)
    assert not cfg.keys() & {"url", "hf_hub_id", "custom_load", "tag", "test_input_size"}
    assert "label_names" not in pretrained_cfg_of(SPECS["uniform"].replace(num_classes=3), base)
