"""What ``explain`` says is what ran: steps, work, padding, kernels; and its three forms hold together."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prunevit.errors import InputError
from prunevit.runtime import Runtime
from prunevit.runtime.explain import Explanation
from prunevit.runtime.waste import LANES
from prunevit_kernels.target import cpu_extension_built
from tests.specs import SPECS, block, random_images, random_model, select, vit

BACKENDS = ["torch", "cpu"]
NAMES = ["every_head_its_own_width", "emptied_after_layer_scale", "cp_vit_cascade", "distilled", "attention_pool"]


@cache
def explained(name: str, backend: str = "cpu", batch: int = 2) -> Explanation:
    runtime = Runtime(random_model(SPECS[name]), device="cpu", backend=backend, threads=1)  # type: ignore[arg-type]
    return runtime.explain(batch, rounds=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_reports_every_step_that_runs(name: str, backend: str) -> None:
    it = explained(name, backend)
    plan = Runtime(random_model(SPECS[name]), device="cpu", backend=backend).plan()  # type: ignore[arg-type]
    assert [step.name for step in it.steps] == [step.name for step in plan.steps]
    assert it.macs == 2 * plan.macs
    for step in it.steps:
        assert step.ms > 0
        assert step.bytes > 0
        assert step.gflops == pytest.approx(2e-6 * step.macs / step.ms)
        assert step.floor_ms >= 2e3 * step.macs / it.peaks.flops
        assert step.executed_macs is None or step.executed_macs >= step.macs
        assert step.why
    assert it.call_ms > 0
    assert 0 < it.peaks.calm <= 1
    assert 0 <= it.padding_bytes < it.buffer_bytes


def test_counts_lanes_that_stick_out() -> None:
    it = explained("one_head_13_by_12", batch=1)
    isa = it.steps[1].kernel.removeprefix("C++ ")
    lanes = LANES[isa]

    def up(size: int) -> int:
        return -(-size // lanes) * lanes

    tokens, width = 13, 29
    executed = {step.op: step.executed_macs for step in it.steps}
    assert executed["norm_linear"] == tokens * width * up(2 * 13 + 12)
    assert executed["ragged_attention"] == up(1) * tokens * (13 + 12)  # the only block: one query is asked
    assert executed["linear_residual"] == 12 * up(width)
    assert executed["fused_mlp"] == width * up(17) + 17 * up(width)
    assert executed["patch_embed"] == 12 * 48 * up(width)
    assert executed["pool_head"] == width * up(7)
    useful = {step.op: step.macs for step in it.steps}
    assert useful["norm_linear"] == tokens * width * 38
    assert useful["fused_mlp"] == 2 * 17 * width


def test_bytes_are_what_moves_once() -> None:
    it = explained("one_head_13_by_12", "torch", batch=2)
    moved = {step.op: step.bytes for step in it.steps}
    tokens, width = 13, 29
    assert moved["norm_linear"] == 4 * (2 * tokens * (width + 38) + 38 * width + 38)
    # class-token pooling: one row is read and written
    assert moved["fused_mlp"] == 4 * (2 * 2 * width + 2 * 17 * width + 17 + width)
    assert moved["ragged_attention"] == 4 * 2 * (tokens * (13 + 12) + 13 + 12)
    assert moved["pool_head"] == 4 * (2 * width + 7 * width + 7 + 2 * width + 2 * 7)  # a row an image, classifier, norm


def test_the_class_tokens_scores_are_one_query_each() -> None:
    spec = vit(block(), block(select=select("mlp", 30, rule="class_attention")), block(), img_size=(56, 56))
    it = Runtime(random_model(spec), device="cpu", backend="cpu", threads=1).explain(rounds=1)
    (scores,) = [step for step in it.steps if step.op == "token_scores"]
    assert scores.macs == 197 * 16
    assert scores.executed_macs == LANES[it.steps[1].kernel.removeprefix("C++ ")] * 197 * 16
    assert it.waste is not None  # a selection multiplies nothing
    assert 0 <= it.waste < 1


@pytest.mark.parametrize("name", [*NAMES, "no_pool"])
def test_the_reference_pads_nothing(name: str) -> None:
    assert explained(name, "torch", batch=3).padding_bytes == 0


@pytest.mark.parametrize("name", ["average_pool_fc_norm", "attention_pool"])
def test_counts_at_the_image_size_that_was_measured(name: str) -> None:
    spec = SPECS[name].replace(dynamic_img_size=True)
    model = random_model(spec)
    model.plan = {"dense": spec.to_dict()}
    it = Runtime(model, device="cpu", backend="torch").explain(2, rounds=1, img_size=(24, 32))
    assert it.spec.img_size == (24, 32)
    assert it.macs == it.spec.macs(2) == it.dense_macs > spec.macs(2)
    assert f"{spec.replace(img_size=(24, 32)).macs() / 5e8:.3f}" in str(it)


def test_measures_whatever_the_default_device() -> None:
    runtime = Runtime(random_model(SPECS["uniform"]), device="cpu")
    with torch.device("meta"):
        assert runtime.explain(1, rounds=1).macs == runtime.plan().macs


def test_says_why_the_reference_ran() -> None:
    asked = explained("uniform", "torch")
    assert {step.kernel for step in asked.steps} == {"PyTorch reference"}
    assert {step.why for step in asked.steps} == {
        "backend torch was asked for"
        if cpu_extension_built()
        else "no C++ kernels: run `python setup.py build_ext --inplace`"
    }
    pooled = explained("attention_pool", "cpu").steps[-1]
    assert pooled.kernel == "PyTorch"
    assert "timm" in pooled.why


def test_compares_with_the_dense_original() -> None:
    model = random_model(vit(block((5,), (3,), 7)))
    dense = vit(block((16, 16), (16, 16), 64), embed_dim=32)
    model.plan = {"dense": dense.to_dict()}
    model.provenance = {"base_model": "tiny"}
    it = Runtime(model, device="cpu").explain(3, rounds=1)
    assert it.dense_macs == dense.macs(3)
    assert it.model == "tiny, pruned"
    assert "dense" in str(it)
    assert json.loads(it.to_json())["dense_macs"] == dense.macs(3)


def test_leaves_the_runtime_as_it_was() -> None:
    spec = SPECS["evit"]
    runtime = Runtime(random_model(spec), device="cpu")
    images = random_images(spec)
    before = runtime(images)
    runtime.explain(3, rounds=1)
    assert torch.equal(runtime(images), before)


@pytest.mark.parametrize(("batch", "rounds"), [(0, 1), (1, 0), (2.0, 1), (True, 1), ("2", 1), (1, 1.5)])
def test_refuses_nothing_to_measure(batch: Any, rounds: Any) -> None:
    with pytest.raises(InputError, match="to be a whole number of at least 1"):
        Runtime(random_model(SPECS["uniform"]), device="cpu").explain(batch, rounds)


# -- the three forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_table_and_json_say_the_same(name: str) -> None:
    it = explained(name)
    data, text = json.loads(it.to_json()), str(it)
    for step in data["steps"]:
        assert step["name"] in text
    assert f"{data['call_ms']:.3f}" in text
    assert data["macs"] == sum(step["macs"] for step in data["steps"])
    assert data["spec"] == it.spec.to_dict()


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_narrow_terminal_has_fewer_columns_and_whole_numbers(width: int) -> None:
    it = explained("every_head_its_own_width")
    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None).print(it.table())
    shown = stream.getvalue()
    assert "…" not in shown
    for step in it.steps:
        row = next(line for line in shown.splitlines() if step.name in line)
        assert f"{step.ms:.3f}" in row.split()
        assert f"{step.peak_share:.0%}" in row.split()
    assert ("no room for" in shown) == (width <= 100)


class _Page(HTMLParser):
    """Checks nesting, and collects whatever could reach out of the page."""

    void = ("meta", "link", "img", "br", "hr", "input", "rect", "line", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.reaches: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.reaches += [
            f"{name}={value}" for name, value in attrs if name in ("src", "href", "data", "srcset", "action")
        ]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", [*NAMES, "no_heads_anywhere", "no_blocks", "removed_sublayers", "no_classes"])
def test_page_is_well_formed_and_stands_alone(name: str) -> None:
    it = explained(name)
    html = it.to_html()
    parser = _Page()
    parser.feed(html)
    assert parser.open == []
    assert parser.reaches == []
    assert "script" not in parser.tags
    assert "link" not in parser.tags
    assert "@import" not in html
    assert "url(" not in html
    addresses = set(re.findall(r"[a-z]+://[^\s\"'<>]*", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace, which nothing fetches
    pictures = re.findall(r"<svg.*?</svg>", html, re.S)
    assert len(pictures) == 3
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        for element in root.iter():
            for attribute in ("x", "y", "width", "height", "cx", "cy", "r", "x1", "x2", "y1", "y2"):
                if attribute in element.attrib:
                    value = float(element.attrib[attribute].removesuffix("%"))
                    assert -1 <= value <= (100.01 if element.attrib[attribute].endswith("%") else 10_000)
    for step in it.steps:
        assert step.name in html


def test_page_escapes_names() -> None:
    model = random_model(SPECS["uniform"])
    model.provenance = {"base_model": "<script>alert('&')</script>"}
    html = Runtime(model, device="cpu").explain(1, rounds=1).to_html()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.parametrize("width", [360, 1200], ids=["phone", "desktop"])
def test_page_fits_in_a_browser(width: int, tmp_path: Path) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: the page was parsed, not opened")
    model = random_model(vit(*[block((13, 5, 1, 8), (12, 3, 7, 8), 31)] * 8))
    html = Runtime(model, device="cpu").explain(1, rounds=1).to_html()
    probe = """<script>addEventListener("load", () => {
        const charts = [...document.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
        const words = [...document.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
        document.title = JSON.stringify({page: document.documentElement.scrollWidth, window: innerWidth,
            charts: charts.map(c => [c.width, c.height]), right: Math.max(...words.map(w => w.right)),
            left: Math.min(...words.map(w => w.left)),
            hidden: [...document.querySelectorAll(".ops")].some(t => t.scrollWidth > t.parentElement.clientWidth)});
    })</script></body>"""
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", probe), "utf-8")
    # an iframe gives the page the width of a phone, which a browser's own window may not have
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" style="border:0;width:{width}px;height:900px"></iframe>'
        '<script>addEventListener("load", () => setTimeout(() => {'
        'document.title = document.getElementById("f").contentDocument.title}, 50))</script>',
        "utf-8",
    )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=3000",
        "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stdout[:500]
    seen = json.loads(title[1])
    assert seen["page"] <= width  # nothing makes the page scroll sideways
    assert seen["left"] >= 0
    assert seen["right"] <= width
    assert not seen["hidden"]  # the table of ops needs no scrolling; the one of steps may
    assert len(seen["charts"]) == 3
    for chart_width, chart_height in seen["charts"]:
        assert chart_width > 0.85 * (width - 60)
        assert chart_height > 100
