"""Every command: what it prints as JSON, what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prunevit import api, shapes
from prunevit.cli import _output, app
from prunevit.cli._options import pairs
from prunevit.data import DIGITS_CFG, data_config, load_data
from prunevit.models import PrunedViT
from prunevit.plots import QK, V, plot_shape
from prunevit.pruning import Plan
from tests.specs import SPECS, random_model

from .conftest import Call, refused

DIGITS = ("--data", "digits")


def digit_files(folder: Path, count: int = 3) -> list[Path]:
    data = load_data("digits")
    files = []
    for i in range(count):
        files.append(folder / f"{i}.png")
        Image.fromarray(data.splits["test"][i][0][0].numpy()).save(files[-1])
    return files


def test_every_command_has_help_and_json(call: Call) -> None:
    listed = call("--help")
    assert listed.code == 0
    names = [command.name for command in app.registered_commands]
    assert {"prune", "run", "demo"} <= set(names)
    for name in names:
        assert name in listed.stdout
        answer = call(name, "--help")
        assert answer.code == 0
        assert "--json" in answer.stdout


def test_it_says_its_version(call: Call) -> None:
    assert call("--version").stdout == f"prunevit {version('prunevit')}\n"


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "prunevit", "info", "snp_deit_small", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["macs"] == shapes.get("snp_deit_small").macs()


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_of_a_published_shape(call: Call) -> None:
    spec = shapes.get("ragged_deit_small")
    found = call("info", "ragged_deit_small", "--json").json
    assert found["macs"] == spec.macs()
    assert found["params"] == spec.params()
    assert found["macs_ratio"] == spec.macs() / shapes.get("deit_small").macs()
    assert [block["qk"] for block in found["blocks"]] == [list(block.qk_dims) for block in spec.blocks]
    assert [block["mlp"] for block in found["blocks"]] == [block.mlp_dim for block in spec.blocks]
    stem = spec.macs() - sum(cost.macs for cost in spec.per_block())
    assert sum(block["macs_share"] for block in found["blocks"]) + stem / spec.macs() == pytest.approx(1)


def test_info_of_a_checkpoint_and_a_timm_model(call: Call, checkpoint: Path) -> None:
    found = call("info", checkpoint, "--json").json
    assert (found["embed_dim"], found["depth"], found["num_classes"]) == (16, 2, 10)
    timm_model = call("info", "deit_small_patch16_224", "--json").json
    assert timm_model["macs"] == shapes.get("deit_small").macs()
    assert timm_model["params"] == shapes.get("deit_small").params() == 22_050_664  # as published: 22 M


def test_info_prints_a_row_a_block(call: Call) -> None:
    text = call("info", "snp_deit_small").stdout
    assert "25 ×6" in text
    assert "44 % of the dense model's MACs" in text
    rows = [line.split() for line in text.splitlines()]
    assert [row[0] for row in rows if len(row) > 5 and row[0].isdigit()] == [str(i) for i in range(12)]


def test_info_says_how_many_tokens_stay_where_some_go(call: Call, tmp_path: Path) -> None:
    spec = SPECS["select_before_mlp"]
    text = call("info", api.save(random_model(spec), tmp_path / "selects")).stdout
    rows = [line.split() for line in text.splitlines()]
    kept = [row[1] for row in rows if len(row) > 5 and row[0].isdigit()]
    assert kept == [str(mlp) for _, _, mlp in spec.tokens()]
    assert len(set(kept)) > 1
    assert "tokens" not in call("info", "snp_deit_small").stdout


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_info_draws_the_shape(call: Call, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"shape.{suffix}"
    assert call("info", "ragged_deit_small", "--plot", path, "--json").json["plot"] == str(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["no_blocks", "no_heads_anywhere", "removed_sublayers"])
def test_what_is_not_there_is_drawn_too(name: str, tmp_path: Path) -> None:
    text = plot_shape(SPECS[name], tmp_path / "shape.svg").read_text("utf-8")
    assert ("emptied" in text, "removed" in text) == (name == "no_heads_anywhere", name == "removed_sublayers")


def test_the_picture_shows_the_widths(call: Call, tmp_path: Path) -> None:
    def area(name: str, colour: str) -> int:
        call("info", name, "--plot", tmp_path / "shape.png")
        pixels = np.asarray(Image.open(tmp_path / "shape.png").convert("RGB")).astype(int)
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return int((abs(pixels - wanted).max(axis=2) <= 2).sum())

    for colour in (QK, V):
        assert 100 < area("snp_deit_small", colour) < 0.8 * area("deit_small", colour)


# -- prune, finetune, eval, run ----------------------------------------------------------------------------------------


def test_prune_then_finetune_then_eval_then_run(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    pruned, tuned = tmp_path / "pruned", tmp_path / "tuned"
    budget = ("--method", "taylor", "--macs", "60%", "--data", "digits", "--images", 32)
    found = call("prune", checkpoint, *budget, "--out", pruned, "--json").json
    assert found["macs"]["after"] <= 0.6 * found["macs"]["before"]
    assert found["images"] == 32
    model = api.load(pruned)
    assert model.spec.macs() == found["macs"]["after"]
    assert model.provenance["method"] == "taylor"
    assert call("info", pruned, "--json").json["macs_ratio"] == found["macs"]["ratio"]

    options = ("--data", "digits", "--epochs", 2, "--teacher", checkpoint, "--lr", 1e-3)
    found = call("finetune", pruned, *options, "--out", tuned, "--json").json
    assert len(found["history"]) == 2
    assert api.load(tuned).provenance["accuracy"]["validation"] == found["accuracy"]["after"]

    found = call("eval", tuned, "--data", "digits", "--backend", "torch", "--json").json
    data = load_data("digits")
    images, labels = next(iter(data.loader("test", data_config(DIGITS_CFG, (1, 8, 8)), batch_size=1000)))
    with torch.no_grad():
        right = (api.load(tuned)(images).argmax(1) == labels).float().mean()
    assert found["images"] == data.size("test") == len(labels)
    assert found["accuracy"] == pytest.approx(float(right), abs=1.5 / len(labels))
    assert found["accuracy_top5"] >= found["accuracy"]

    files = digit_files(tmp_path)
    found = call("run", tuned, *files, "--top-k", 2, "--backend", "torch", "--json").json
    with torch.no_grad():
        probabilities = api.load(tuned)(images[:3]).softmax(1)
    for image, file, expected in zip(found["images"], files, probabilities):
        assert image["path"] == str(file)
        assert [top["index"] for top in image["top"]] == expected.topk(2).indices.tolist()
        assert image["top"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-4)
        assert image["top"][0]["label"] == str(image["top"][0]["index"])


def test_text_says_what_was_written(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    answer = call("prune", checkpoint, "--method", "magnitude", "--params", "70%", "--out", out)
    assert answer.code == 0
    assert "parameters" in answer.stdout
    assert str(out) in "".join(answer.stdout.split("\n"))
    (image,) = digit_files(tmp_path, 1)
    answer = call("run", out, image, "--backend", "torch")
    assert answer.code == 0
    assert "probability" in answer.stdout
    answer = call("eval", out, "--data", "digits", "--backend", "torch")
    assert "top-1" in answer.stdout


def test_a_log_shows_how_training_goes(
    call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_output, "SECONDS_BETWEEN_LINES", 0)
    answer = call("finetune", checkpoint, "--data", "digits", "--epochs", 2, "--out", tmp_path / "tuned")
    lines = answer.stdout.splitlines()
    epochs = [line for line in lines if re.fullmatch(r"epoch [12] of 2: loss [\d.]+, validation top-1 [\d.]+ %", line)]
    assert len(epochs) == 2
    steps = [line for line in lines if line.startswith("training: ")]
    assert steps[0].startswith("training: 1 of ")
    total = steps[0].rsplit(" ", 1)[1]
    assert steps[-1] == f"training: {total} of {total}"
    monkeypatch.setattr(_output, "SECONDS_BETWEEN_LINES", 3600)
    options = ("--method", "taylor", "--macs", "90%", "--data", "digits")
    assert "pruning by taylor" not in call("prune", checkpoint, *options, "--out", tmp_path / "pruned").stdout


def test_prune_takes_groups_ignored_layers_and_multiples(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    options = ("--groups", "mlp", "--ignored-layers", "blocks.0.*", "--round-to", 8, "--pruning-ratio", 0.5)
    call("prune", checkpoint, "--method", "magnitude", *options, "--out", tmp_path / "out", "--json").json  # noqa: B018
    first, second = api.load(tmp_path / "out").spec.blocks
    assert (first.mlp_dim, second.mlp_dim) == (64, 32)
    assert second.qk_dims == first.qk_dims == (8, 8)


def test_isomorphic_ranking_makes_ragged_shapes(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    call("prune", checkpoint, "--method", "magnitude", "--macs", "60%", "--isomorphic", "--out", tmp_path / "out")
    widths = {block.mlp_dim for block in api.load(tmp_path / "out").spec.blocks}
    assert len(widths) == 2


def test_methods_given_one_after_another_compose(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    pruned = tmp_path / "first"
    call("prune", checkpoint, "--method", "magnitude", "--macs", "80%", "--out", pruned, "--json")
    found = call("prune", pruned, "--method", "random", "--macs", "80%", "--out", tmp_path / "second", "--json").json
    assert found["macs"]["ratio"] <= 0.8
    plan = Plan.from_dict(api.load(tmp_path / "second").plan or {})
    assert plan.dense == api.load(checkpoint).spec


def test_the_same_seed_prunes_alike(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    plans = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        call("prune", checkpoint, "--method", "random", "--macs", "50%", "--seed", seed, "--out", tmp_path / name)
        plans.append(api.load(tmp_path / name).plan)
    assert plans[0] == plans[1] != plans[2]


def test_eval_of_features_is_refused(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    model = api.load(checkpoint)
    model.reset_classifier(0)
    api.save(model, tmp_path / "features")
    refused(call("eval", tmp_path / "features", *DIGITS), "a checkpoint with classes")


def test_finetune_can_learn_new_classes(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    for place, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), 200 * place + i).save(tmp_path / "images" / name / f"{i}.png")
    data = tmp_path / "images"
    refused = call("finetune", checkpoint, "--data", data, "--out", tmp_path / "no")
    assert refused.code == 1
    assert "named as the model's classes" in refused.stderr
    assert "to train a new classifier for these 2: prunevit finetune --new-classes" in refused.stderr
    assert not (tmp_path / "no").exists()
    for epochs, said in ((3, "3 epochs on"), (1, "1 epoch on")):
        options = ("--data", data, "--new-classes", "--epochs", epochs, "--lr", 1e-2, "--batch-size", 4)
        answer = call("finetune", checkpoint, *options, "--out", tmp_path / "two")
        assert answer.code == 0
        assert said in " ".join(answer.stdout.split())
    model = api.load(tmp_path / "two")
    assert model.spec.num_classes == 2
    found = call("run", tmp_path / "two", data / "bright" / "3.png", "--backend", "torch", "--json").json
    assert {top["label"] for top in found["images"][0]["top"]} == {"dark", "bright"}


def test_finetune_gives_a_timm_model_classes_of_ones_own(call: Call, tmp_path: Path) -> None:
    for place, name in enumerate(("dark", "bright")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            Image.new("RGB", (8, 8), (200 * place + i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    options = ("--data", tmp_path / "images", "--no-pretrained", "--recipe", "max_steps=1", "--batch-size", 4)
    told = call("finetune", "test_vit", *options, "--out", tmp_path / "two")
    refused(told, "prunevit finetune --new-classes")
    found = call("finetune", "test_vit", *options, "--new-classes", "--out", tmp_path / "two", "--json").json
    assert found["model"] == "test_vit"
    model = api.load(tmp_path / "two")
    assert (model.spec.num_classes, model.pretrained_cfg["label_names"]) == (2, ["bright", "dark"])
    assert model.provenance["base_model"].startswith("test_vit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_size": (16, 16)}, "model's images, of 1 × 8 × 8, got 1 × 16 × 16"),
        ({"in_chans": 3}, "model's images, of 1 × 8 × 8, got 3 × 8 × 8"),
        ({"mean": [0.1]}, r"of mean .* got \(0.1,\)"),
    ],
    ids=["size", "channels", "statistics"],
)
def test_a_teacher_of_other_images_is_refused(
    call: Call, checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    like = api.load(checkpoint)
    mean = change.pop("mean", None)
    teacher = PrunedViT(like.spec.replace(**change))
    teacher.pretrained_cfg = {} if "in_chans" in change else {**like.pretrained_cfg, **({"mean": mean} if mean else {})}
    api.save(teacher, tmp_path / "teacher", check=False)
    options = ("--data", "digits", "--teacher", tmp_path / "teacher", "--out", tmp_path / "out")
    refused(call("finetune", checkpoint, *options), message)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epochs", "lr", "distillation"])
def test_what_has_an_option_is_not_taken_from_the_recipe_too(call: Call, tmp_path: Path, name: str) -> None:
    answer = call("finetune", tmp_path, *DIGITS, "--recipe", f"{name}=3", "--out", tmp_path / "out")
    assert answer.code == 2
    assert f"expected {name} by --{name}" in " ".join(answer.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("false", False), ("False", False), ("None", None), ("null", None), (".9", 0.9), ("1e-3", 1e-3)),
        *(("[1, 2]", [1, 2]), ("adamw", "adamw"), ("runs/a-1.jsonl", "runs/a-1.jsonl"), ("'8'", "8"), ("", "")),
    ],
)
def test_values_are_read_as_json_or_python_spells_them(text: str, value: object) -> None:
    assert pairs([f" name = {text}"], "--option") == {"name": value}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "deit_smal_patch16_224"), "deit_small_patch16_224"),
        (("info", "./nowhere"), "nowhere"),
        (("info", "swin_tiny_patch4_window7_224"), "swin|Swin"),
        (("finetune", "{}", *DIGITS, "--recipe", "alpha=much", "--out", "{out}"), "alpha to be float, got 'much'"),
        (("finetune", "{}", *DIGITS, "--recipe", "teacher=x", "--out", "{out}"), "options of recover .* got teacher"),
        (("finetune", "{}", *DIGITS, "--recipe", "model=x", "--out", "{out}"), "options of recover .* got model"),
        (("prune", "{}", "--macs", "90%", "--option", "seed=3", "--out", "{out}"), "options of snp .* got seed"),
        (("prune", "{}", "--macs", "90%", "--option", "on_step=3", "--out", "{out}"), "options of snp .* got on_step"),
        (
            (
                "prune",
                "{}",
                "--macs",
                "90%",
                *DIGITS,
                "--recovery-epochs",
                "1",
                "--recipe",
                "state=x",
                "--out",
                "{out}",
            ),
            "options of recover .* got state",
        ),
        (
            ("prune", "{}", "--method", "evit", "--macs", "90%", "--round-to", "7", "--out", "{out}"),
            "that evit goes by, .* got round_to",
        ),
        (("run", "{}", "."), "image file ., got a folder"),
        (("export", "{}", "--opset", "99", "--out", "{out}"), "opset from"),
        (("eval", "{}", "--data", "no/where"), "no/where"),
        (("run", "{}", "no_such.png"), "no_such.png"),
        (("finetune", "./nowhere", "--data", "digits", "--out", "{out}"), "nowhere"),
    ],
    ids=lambda value: "_".join(value[:1]) if isinstance(value, tuple) else None,
)
def test_a_named_error_is_one_message_and_exit_code_1(
    call: Call, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    filled = [a.replace("{}", str(checkpoint)).replace("{out}", str(tmp_path / "out")) for a in arguments]
    answer = call(*filled, "--json")
    refused(answer, message)
    error = answer.json["error"]
    assert re.search(message, error["message"])
    assert error["type"] in {"CheckpointError", "DataError", "InputError", "PruningError", "UnsupportedModel"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", "{}", "--rounds", "1"),
        ("eval", "{}", *DIGITS),
        ("run", "{}", "{}/one.png"),
        ("prune", "{}", "--method", "magnitude", "--memory", "50%", "--on", "cpu", "--out", "{out}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_the_cpu_backend_without_its_extension_is_a_named_error(
    call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    model = shutil.copytree(checkpoint, tmp_path / "model")
    Image.new("L", (8, 8)).save(model / "one.png")
    monkeypatch.setitem(sys.modules, "prunevit_kernels._cpu", None)
    filled = [a.replace("{}", str(model)).replace("{out}", str(tmp_path / "out")) for a in arguments]
    refused(call(*filled, "--backend", "cpu", "--json"), r"setup\.py build_ext --inplace")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("info", "snp_deit_small", "--plot", "shape.txt"),
        ("info", "snp_deit_small", "--plot", "{out}/deep/shape.png"),
        ("explain", "{}", "--html", "{out}/page.html"),
        ("explain", "{}", "--html", "{}"),
        ("demo", "--out", "{}/config.json"),
        ("eval", "{}", "--data", "digits", "--backend", "tpu"),
        ("eval", "{}", "--data", "digits", "--split", "all"),
        ("run", "{}", "a.png", "--top-k", "0"),
        ("nonsense",),
    ],
    ids=[
        "nothing",
        "unknown_picture",
        "picture_in_no_folder",
        "page_in_no_folder",
        "page_that_is_a_folder",
        "folder_that_is_a_file",
        "unknown_backend",
        "unknown_split",
        "no_class",
        "unknown_command",
    ],
)
def test_wrong_usage_is_exit_code_2(call: Call, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    filled = [a.replace("{}", str(checkpoint)).replace("{out}", str(tmp_path / "out")) for a in arguments]
    assert call(*filled).code == 2
    assert not (tmp_path / "out").exists()


def test_a_broken_image_in_a_worker_is_one_message(call: Call, checkpoint: Path, tmp_path: Path) -> None:
    for name in DIGITS_CFG["label_names"]:
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("L", (8, 8), 20 * i).save(tmp_path / "images" / name / f"{i}.png")
    for broken in (tmp_path / "images").rglob("*.png"):
        broken.write_bytes(b"broken")
    answer = call("eval", checkpoint, "--data", tmp_path / "images", "--workers", 1, "--backend", "torch", "--json")
    assert answer.code == 1
    assert answer.json["error"]["type"] == "DataError"
    assert answer.json["error"]["message"].startswith("cannot read the image")


@pytest.mark.parametrize(
    "command",
    [("prune", "{model}", "--macs", "50%"), ("finetune", "{model}", "--data", "digits"), ("demo",)],
    ids=lambda command: command[0],
)
def test_where_nothing_can_be_written_is_said_before_the_work(
    call: Call, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr("prunevit.cli._models.open_model", lambda *_, **__: pytest.fail("opened"))
    monkeypatch.setattr(api, "load", lambda *_: pytest.fail("opened"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").write_text("in the way")
    out = "." if command[0] == "demo" else "checkpoint"
    arguments = [word.format(model=checkpoint) for word in command]
    refused(call(*arguments, "--out", out, "--json"), "checkpoint: expected a directory .* a file")
