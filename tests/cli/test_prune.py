"""``prunevit prune``: every method and every kind of budget from the command line, on digits with a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from prunevit import BlockSpec, PrunedViT, ViTSpec, api
from prunevit.cli import _budgets
from prunevit.data import load_data
from prunevit.pruning import KINDS, METHODS, Plan
from prunevit.pruning.groups import Kind
from tests.clock import count_macs

from .conftest import Call, refused

DIGITS = ("--data", "digits", "--images", 32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prune(call: Call, checkpoint: Path, tmp_path: Path) -> Any:
    """``prune("--macs", "60%")`` writes ``tmp_path / "out"`` and gives the JSON."""

    def run(*arguments: object) -> dict[str, Any]:
        answer = call("prune", checkpoint, *arguments, "--out", tmp_path / "out", "--json")
        assert answer.code == 0, answer.stderr
        return answer.json

    return run


def test_the_command_line_knows_the_methods_and_kinds() -> None:
    assert tuple(sorted(METHODS)) == _budgets.METHODS
    assert _budgets.KINDS == KINDS == get_args(Kind)


def test_help_says_what_each_method_does(call: Call) -> None:
    methods, rest = call("prune", "--help").stdout.split("Methods; ")[1].split("Redundancy ranked")
    lines = {line.split()[0]: line for line in methods.splitlines()[1:] if line.strip()}
    assert set(lines) == set(METHODS)
    assert {name for name, line in lines.items() if line.split()[1] == "*"} == set(_budgets.LOOKS_AT_IMAGES)
    assert "--method snp:qk,magnitude:v,mlp,channel --macs 90%,50%" in rest


def test_the_combination_that_help_names(prune: Any) -> None:
    found = prune("--method", "snp:qk,magnitude:v,mlp,channel", "--macs", "90%,50%", *DIGITS)
    assert found["method"] == ["snp:qk", "magnitude:v,mlp,channel"]
    assert 0.3 < found["macs"]["ratio"] <= 0.5


@pytest.mark.parametrize(
    ("method", "needs"),
    [
        ("snp", DIGITS),
        ("magnitude", ()),
        ("random", ()),
        ("taylor", DIGITS),
        ("gohsp", DIGITS),
        ("cp-vit", DIGITS),
        ("evit", ("--option", "layers=[0]")),
        ("auto", (*DIGITS, "--scorer", "magnitude", "--tau", 1)),
    ],
)
def test_every_method_keeps_its_budget(
    prune: Any, checkpoint: Path, tmp_path: Path, method: str, needs: tuple[object, ...]
) -> None:
    found = prune("--method", method, "--macs", "80%", *needs)
    assert 0.6 < found["macs"]["ratio"] <= 0.8  # five tokens: the smallest unit of evit is a fifth
    assert found["method"] == [method]
    assert found["constraints"] == {"macs": "80%"}
    model = api.load(tmp_path / "out")
    assert model.provenance["method"] == method
    assert Plan.from_dict(model.plan).dense == api.load(checkpoint).spec


def test_auto_journals_its_search_draws_it_and_goes_on(prune: Any, tmp_path: Path) -> None:
    files = ("--journal", tmp_path / "search.jsonl", "--plot", tmp_path / "search.png")
    options = ("--method", "auto", "--scorer", "magnitude", "--tau", 1, "--macs", "70%", *DIGITS, *files)
    found = prune(*options)
    assert found["accuracy"]["split"] == "validation"
    assert found["journal"] == str(tmp_path / "search.jsonl")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "search.jsonl").read_text()
    header = json.loads(lines.splitlines()[0])
    assert (header["scorer"], header["tau"]) == ("magnitude", 1)
    plan = api.load(tmp_path / "out").plan
    (tmp_path / "search.jsonl").write_text("\n".join(lines.splitlines()[:2]) + "\n")
    assert prune(*options)["macs"] == found["macs"]
    assert (tmp_path / "search.jsonl").read_text() == lines
    assert api.load(tmp_path / "out").plan == plan


def test_auto_of_some_kinds_measures_and_journals_as_auto(prune: Any, tmp_path: Path) -> None:
    search = ("--scorer", "magnitude", "--tau", 1, "--journal", tmp_path / "search.jsonl")
    found = prune("--method", "auto:mlp", "--macs", "80%", *DIGITS, *search, "--plot", tmp_path / "search.svg")
    assert found["macs"]["ratio"] <= 0.8
    assert found["accuracy"]["split"] == "validation"
    assert (tmp_path / "search.svg").exists()


def test_auto_tunes_between_rounds_and_plots_without_a_journal(prune: Any, tmp_path: Path) -> None:
    training = ("--finetune-epochs", 1, "--lr", 1e-4, "--recipe", "max_steps=2")
    found = prune(
        "--method", "auto", "--scorer", "snp", "--tau", 1, "--macs", "80%", *DIGITS, *training,
        "--plot", tmp_path / "search.svg",
    )  # fmt: skip
    assert found["journal"] is None
    assert (tmp_path / "search.svg").exists()


def test_gohsp_prunes_softly_and_finetunes(prune: Any, tmp_path: Path) -> None:
    training = ("--stages", 2, "--stage-epochs", 1, "--finetune-epochs", 1, "--lr", 1e-3, "--option", "rho=0.01")
    found = prune("--method", "gohsp", "--params", "80%", *DIGITS, *training, "--recipe", "max_steps=4")
    assert found["params"]["ratio"] <= 0.8
    assert found["accuracy"]["after"] > 0
    assert api.load(tmp_path / "out").provenance["accuracy"]["validation"] == found["accuracy"]["after"]


def test_a_list_of_methods_each_with_its_kinds(prune: Any, tmp_path: Path) -> None:
    found = prune("--method", "snp,taylor:head,mlp", "--method", "random:v", "--macs", "60%", *DIGITS)
    assert found["method"] == ["snp", "taylor:head,mlp", "random:v"]
    assert found["macs"]["ratio"] <= 0.6
    assert api.load(tmp_path / "out").provenance["method"] == "snp+taylor:head,mlp+random:v"


def test_constraints_for_each_of_several_methods(prune: Any) -> None:
    found = prune("--method", "magnitude:mlp,magnitude:v", "--macs", "90%,80%", "--params", "95%")
    assert found["constraints"] == [{"macs": "90%", "params": "95%"}, {"macs": "80%", "params": "95%"}]
    assert found["macs"]["ratio"] <= 0.8


def test_rounds_with_recovery_in_between(prune: Any) -> None:
    found = prune(
        "--method", "magnitude", "--macs", "60%", "--data", "digits", "--rounds", 2, "--recovery-epochs", 1,
        "--lr", 1e-3, "--recipe", "max_steps=3", "--recipe", "opt=sgd",
    )  # fmt: skip
    assert found["macs"]["ratio"] <= 0.6
    assert found["accuracy"]["split"] == "validation"


def test_ratios_from_a_file_and_options_by_name(prune: Any, tmp_path: Path) -> None:
    for name, text in (("r.yaml", "blocks.0.mlp: 0.5\nqk: 0.25\n"), ("r.json", '{"blocks.0.mlp": 0.5, "qk": 0.25}')):
        (tmp_path / name).write_text(text)
        prune("--method", "snp", "--ratios", tmp_path / name, "--option", "gamma=2", "--groups", "qk,mlp", *DIGITS)
        first, second = api.load(tmp_path / "out").spec.blocks
        assert (first.mlp_dim, second.mlp_dim) == (32, 64)
        assert first.qk_dims == second.qk_dims == (6, 6)


def test_a_shape_is_reached_exactly(call: Call, prune: Any, checkpoint: Path, tmp_path: Path) -> None:
    call("prune", checkpoint, "--method", "random", "--macs", "60%", "--isomorphic", "--out", tmp_path / "first")
    found = prune("--method", "snp", "--shape", tmp_path / "first", *DIGITS)
    assert api.load(tmp_path / "out").spec.blocks == api.load(tmp_path / "first").spec.blocks
    assert found["constraints"] == {}


def test_calibration_takes_as_many_images_as_the_method_does(prune: Any, call: Call, tmp_path: Path) -> None:
    """Else the command line would measure on fewer than the same call from Python, and say nothing of it."""
    few, every = 64, load_data("digits").size("calibration")
    assert few < every < METHODS["taylor"].images  # type: ignore[attr-defined]

    def counted(*arguments: object) -> int | None:
        found: int | None = prune("--macs", "80%", "--data", "digits", *arguments)["images"]
        return found

    assert counted("--method", "taylor") == every
    plan = api.load(tmp_path / "out").plan
    assert counted("--method", "taylor", "--option", "images=512") == every
    assert api.load(tmp_path / "out").plan == plan
    assert counted("--method", "taylor", "--option", "images=20") == counted("--method", "taylor", "--images", 20) == 20
    assert counted("--method", "snp") == few
    assert counted("--method", "snp:qk,taylor:mlp") == every
    # more than snp's own number is more for snp too
    assert counted("--method", "snp", "--images", 100) == 100
    assert api.load(tmp_path / "out").provenance["prunings"][-1]["images"] == 100
    search = ("--method", "auto", "--tau", 1)
    assert counted(*search, "--images", 100) == few, "its scorer has options of its own"
    assert counted(*search, "--scorer", "magnitude") is None
    counts = {METHODS[name].images for name in {*_budgets.LOOKS_AT_IMAGES} - {"auto", "taylor"}}  # type: ignore[attr-defined]
    assert counts == {few}
    shown = " ".join(call("prune", "--help").stdout.replace("│", " ").split())
    assert "512 by taylor, 64 by the others" in shown


# -- latency and memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def by_macs(monkeypatch: pytest.MonkeyPatch) -> None:
    count_macs(monkeypatch)


@pytest.mark.usefixtures("by_macs")
def test_latency_and_memory_budgets(prune: Any, call: Call, checkpoint: Path, tmp_path: Path) -> None:
    where = ("--on", "cpu", "--batch", 2, "--threads", 1)
    found = prune("--method", "magnitude", "--latency", "70%", "--memory", "90%", *where)
    took = found["latency"]
    assert took["measured_ms"] <= took["limit_ms"] == pytest.approx(0.7 * took["dense_ms"])
    assert (took["batch"], took["threads"], took["device"]) == (2, 1, "cpu")
    assert found["memory"]["ratio"] <= 0.9
    milliseconds = 0.6 * took["dense_ms"]
    limits = ("--latency", f"{1e3 * milliseconds:.3f}us", "--memory", "1MB")
    found = prune("--method", "magnitude", *limits, *where)
    assert found["latency"]["limit_ms"] == pytest.approx(milliseconds, rel=1e-3)
    assert found["constraints"]["memory"] == 1e6
    told = call("prune", checkpoint, "--method", "magnitude", *limits, *where, "--out", tmp_path / "out")
    shown = " ".join(told.stdout.split())
    assert "the whole model" in shown
    assert "memory" in shown


@pytest.mark.usefixtures("by_macs")
def test_the_search_of_the_last_attempt_is_drawn(prune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holds, drawn = iter([False, True]), list[object]()
    monkeypatch.setattr("prunevit.latency.measured.Check.holds", lambda self, tolerance: next(holds))
    monkeypatch.setattr("prunevit.cli._prune.plot_journal", lambda path, out: drawn.append(path))
    search = ("--method", "auto", "--scorer", "magnitude", "--tau", 1, "--latency", "80%", "--threads", 1, *DIGITS)
    found = prune(*search, "--journal", tmp_path / "j", "--plot", tmp_path / "p.png")
    assert found["latency"]["attempts"] == 2
    assert found["journal"] == drawn[0] == str(tmp_path / "j.2")


def test_a_latency_budget_on_the_real_clock(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose time is in its widths; the tolerance is for a machine that does something else beside."""
    monkeypatch.setattr("prunevit.latency.measured.SECONDS", 0.2)
    block = BlockSpec(qk_dims=(16,) * 4, v_dims=(16,) * 4, attn_scale=0.25, mlp_dim=512)
    spec = ViTSpec(img_size=(8, 8), patch_size=(2, 2), in_chans=1, num_classes=10, embed_dim=64, blocks=(block,) * 2)
    wide = api.save(PrunedViT(spec), tmp_path / "wide")
    table = tmp_path / "table.json"
    options = ("--on", "cpu", "--threads", 1, "--table", table, "--tolerance", 0.9, "--batch", 8)
    found = call(
        "prune", wide, "--method", "magnitude", "--latency", "70%", *options, "--out", tmp_path / "out", "--json"
    ).json
    assert found["latency"]["measured_ms"] <= 1.9 * found["latency"]["limit_ms"]
    assert json.loads(table.read_text())["of"]["batch"] == 8


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a budget"),
        (("--macs", "banana"), "expected a share"),
        (("--macs", "120%"), "between 0% and 100%"),
        (("--method", "magic", "--macs", "50%"), "a method out of auto"),
        (("--method", "snp,heads", "--macs", "50%"), "a method out of auto"),
        (("--method", "snp,head", "--macs", "50%"), "taylor:head"),
        (("--method", "snp:heads", "--macs", "50%"), "kinds of group out of head"),
        (("--method", ",", "--macs", "50%"), "got none"),
        (("--macs", "50%,40%"), "one for each of 1 methods"),
        (("--latency", "20MB"), "20ms"),
        (("--memory", "20ms"), "50MB"),
        (("--macs", "50%", "--option", "gamma"), "NAME=VALUE"),
        (("--macs", "50%", "--lr", "0.1"), "something that trains"),
        (("--macs", "50%", "--recovery-epochs", "1"), "images to train on"),
        (("--macs", "50%", "--method", "auto"), "measure accuracy"),
        (("--macs", "50%", "--method", "snp,auto:mlp"), "measure accuracy"),
        (("--macs", "50%", "--recovery-epochs", "1", "--recipe", "epochs=4"), "epochs by --recovery-epochs"),
        (("--macs", "50%", "--recovery-epochs", "1", "--recipe", "lr=1"), "lr by --lr"),
        (("--macs", "50%", "--round-to", "8", "--option", "round_to=4"), "round_to by --round-to"),
        (("--pruning-ratio", "0.1", "--ratios", "r.json"), "one pruning ratio or a file of them, got both"),
        (("--option", "pruning_ratio=0.1", "--ratios", "r.json"), "got both"),
        (("--macs", "50%", "--journal", "j"), "--method auto"),
        (("--macs", "50%", "--on", "cpu"), "--on: expected --latency or --memory"),
        (("--macs", "50%", "--batch", "8", "--table", "t.json"), "--batch, --table: expected --latency or --memory"),
        (("--macs", "50%", "--backend", "torch"), "--backend: expected --latency or --memory"),
        (("--macs", "50%", "--method", "magnitude", "--stages", "2"), "--stages: expected --method gohsp"),
        (("--macs", "50%", "--tau", "0.1"), "--tau: expected --method auto"),
        (("--macs", "50%", "--method", "auto", "--data", "digits", "--plot", "p.txt"), ".png"),
        (("--macs", "50%", "--method", "auto", *DIGITS, "--plot", "p.png", "--rounds", "2"), "one search to draw"),
        (("--macs", "50%", "--method", "auto:qk,auto:mlp", *DIGITS, "--plot", "p.png"), "one search to draw"),
    ],
)
def test_wrong_usage_is_named(
    call: Call, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    answer = call("prune", checkpoint, *arguments, "--out", tmp_path / "out")
    assert answer.code == 2
    shown = " ".join(answer.stderr.replace("│", " ").split())  # rich draws a box, and wraps in it
    assert message in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "magnitude", "--macs", "0.001%"), "floor"),
        (("--macs", "50%"), "images that snp can measure on .--data DIR"),
        (("--method", "taylor", "--macs", "50%"), "images that taylor can measure on"),
        (
            ("--macs", "50%", "--data", "digits", "--option", "images=all"),
            "a number of images of at least 1, got 'all'",
        ),
        (("--method", "magnitude", "--macs", "50%", "--data", "no/where"), "no/where"),
        (("--macs", "50%", "--option", "gamma=eight"), "gamma .* 'eight'"),
        (("--macs", "50%", "--option", "pruning_ratio=much"), "pruning_ratio .* 'much'"),
        (("--latency", "50%", "--on", "tpu"), "a device such as cpu.* 'tpu'"),
        (("--method", "magnitude", "--ratios", "{tmp}/none.yaml"), "No such file"),
        (("--method", "magnitude", "--ratios", "{checkpoint}/model.safetensors"), "JSON or YAML"),
        (("--method", "magnitude", "--macs", "50%", "--option", "gamma=8"), "options of magnitude"),
        (("--method", "magnitude", "--ratios", "{tmp}/none.yaml"), "ratios by address"),
        (("--method", "magnitude", "--ratios", "{tmp}/list.yaml"), "blocks.0.mlp: 0.5"),
        (("--method", "magnitude", "--shape", "no_such_shape"), "no_such_shape"),
        (("--method", "magnitude", "--macs", "50%", "--device", "abacus"), "a device such as cpu"),
        (("--method", "magnitude", "--latency", "50%", "--table", "{tmp}/list.yaml", "--on", "cpu"), "a latency table"),
    ],
)
def test_a_named_error_writes_nothing(
    call: Call, checkpoint: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "list.yaml").write_text("[1, 2]")
    filled = [a.format(tmp=tmp_path, checkpoint=checkpoint) for a in arguments]
    refused(call("prune", checkpoint, *filled, "--out", tmp_path / "out"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("macs", "45%", "45%"),
        ("macs", "45.5 %", "45.5%"),
        ("macs", "2.0G", 2.0e9),
        ("params", "900m", 9e8),
        ("macs", "1.3e9", 1.3e9),
        ("latency", "20ms", 20.0),
        ("latency", "0.5 s", 500.0),
        ("latency", "20", 20.0),
        ("memory", "50MB", 50e6),
        ("memory", "1 GiB", 2.0**30),
    ],
)
def test_budgets_are_shares_or_numbers(name: str, text: str, value: object) -> None:
    assert _budgets.constraint(name, text) == value
    with pytest.raises(typer.BadParameter, match="expected a share"):
        _budgets.constraint(name, "20 parsecs")


# -- several processes -------------------------------------------------------------------------------------------------


def test_finetune_under_torchrun(call: Call, prune: Any, tmp_path: Path) -> None:
    """Two processes on the CPU average their gradients: one speaks, one checkpoint is written, and it has learnt."""
    prune("--method", "magnitude", "--macs", "80%")
    command = ["finetune", tmp_path / "out", "--data", "digits", "--out", tmp_path / "tuned", "--json"]
    options = ["--epochs", 2, "--lr", 3e-3, "--batch-size", 32, "--state", tmp_path / "run", "--device", "cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "prunevit"]
    with subprocess.Popen(
        [str(part) for part in (*torchrun, *command, *options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        try:
            stdout, stderr = running.communicate(timeout=250)
        except subprocess.TimeoutExpired:
            running.terminate()  # torchrun ends its processes; killed, it would leave them
            raise
    assert running.returncode == 0, stderr[-3000:]
    found = json.loads(stdout)  # one object, of one process
    assert found["processes"] == 2
    images = found["images"]
    assert [epoch["steps"] for epoch in found["history"]] == [images // 64, 2 * (images // 64)]
    assert found["accuracy"]["after"] > found["accuracy"]["before"]
    assert api.load(tmp_path / "tuned").provenance["accuracy"]["validation"] == found["accuracy"]["after"]
    refused = call("finetune", tmp_path / "out", "--data", "digits", "--out", tmp_path / "x", "--distillation", "hard")
    assert refused.code == 2
