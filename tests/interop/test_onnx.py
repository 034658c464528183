"""The exported file computes what the runtime computes, in ONNX Runtime and in OpenVINO, at any batch size."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onnx import load
from onnx.defs import onnx_opset_version
from torch import Tensor

from prunevit import checkpoint
from prunevit.errors import InputError, MissingPackage, RuntimeMismatch
from prunevit.interop import export_onnx, onnx
from prunevit.runtime import Runtime
from tests.specs import SPECS, random_images, random_model

onnxruntime = pytest.importorskip("onnxruntime", reason="the test extra installs onnxruntime")
openvino = pytest.importorskip("openvino", reason="the test extra installs openvino")

NAMES = ["every_head_its_own_width", "partial_writes_with_layer_scale", "evit", "cp_vit_cascade"]


def in_onnxruntime(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def in_openvino(path: Path, images: Tensor) -> Tensor:
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled({0: images.numpy()})[0].copy())


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return request.param, export_onnx(random_model(SPECS[request.param]), path)


def test_computes_what_the_runtime_computes(exported: tuple[str, Path]) -> None:
    name, path = exported
    model, images = random_model(SPECS[name]), random_images(SPECS[name], batch=5)
    with torch.no_grad():
        truth = model.double()(images.double())
        least = (model.float()(images).double() - truth).abs().max()
    allowed = 2 * least + 32 * torch.finfo(torch.float32).eps * truth.abs().max()
    runtime = Runtime(model, device="cpu")
    for size in (1, 5):
        for got in (in_onnxruntime(path, images[:size]), in_openvino(path, images[:size]), runtime(images[:size])):
            assert got.shape == truth[:size].shape
            assert (got.double() - truth[:size]).abs().max() <= allowed


def test_is_one_file_with_its_spec(exported: tuple[str, Path]) -> None:
    name, path = exported
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    import onnx as standard

    model = standard.load(path, load_external_data=False)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert [(i.name, i.type.tensor_type.shape.dim[0].dim_param) for i in model.graph.input] == [("images", "batch")]
    assert [output.name for output in model.graph.output] == ["logits"]
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["prunevit.spec"]) == SPECS[name].to_dict()


def test_nothing_is_padded() -> None:
    """Heads of 13 by 12 and 5 by 3: products of exactly these widths, none of the wider of the two."""
    program = onnx._exported(random_model(SPECS["one_head_13_by_12"]), 20, 2)
    widths = {
        value.shape[-1]
        for node in program.model.graph
        for value in node.outputs
        if value.shape and len(value.shape) == 4
    }
    assert 12 in widths
    assert not [node for node in program.model.graph if node.op_type == "Pad"]


def test_exports_a_checkpoint_at_a_fixed_batch(tmp_path: Path) -> None:
    spec = SPECS["uniform"]
    directory = checkpoint.save(random_model(spec), tmp_path / "model")
    path = export_onnx(directory, tmp_path / "fixed.onnx", batch=2, opset=18)
    session = onnxruntime.InferenceSession(str(path))
    assert session.get_inputs()[0].shape == [2, 3, *spec.img_size]


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    real = onnx._exported

    def spoilt(source: Any, *arguments: Any) -> Any:
        other = random_model(source.spec, seed=9)
        return real(other, *arguments)

    monkeypatch.setattr(onnx, "_exported", spoilt)
    with pytest.raises(RuntimeMismatch, match="nothing was written"):
        export_onnx(random_model(SPECS["one_head_13_by_12"]), path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("check", [True, False])
def test_an_opset_that_the_exporter_cannot_write_is_refused(check: bool, tmp_path: Path) -> None:
    """It would leave another one, whose operators are not those of the graph."""
    model = random_model(SPECS["one_head_13_by_12"])
    highest = onnx_opset_version()
    try:
        path = export_onnx(model, tmp_path / "x.onnx", opset=highest, check=check)
    except InputError as error:
        assert f"got {highest}: lower it" in str(error)  # noqa: PT017  either is right, with the exporter's version
        assert list(tmp_path.iterdir()) == []
    else:
        assert {(i.domain, i.version) for i in load(path).opset_import} == {("", highest)}


def test_a_link_stays_a_link_whatever_the_default_dtype(tmp_path: Path) -> None:
    (tmp_path / "real.onnx").write_text("old")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real.onnx")
    torch.set_default_dtype(torch.float64)
    try:
        path = export_onnx(random_model(SPECS["one_head_13_by_12"]).float(), tmp_path / "link.onnx")
    finally:
        torch.set_default_dtype(torch.float32)
    assert path.is_symlink()
    assert load(tmp_path / "real.onnx").producer_name == "prunevit"


def test_refuses_before_it_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(SPECS["uniform"])
    with pytest.raises(InputError, match="opset from 18 to"):
        export_onnx(model, tmp_path / "x.onnx", opset=11)
    with pytest.raises(InputError, match="at least one image"):
        export_onnx(model, tmp_path / "x.onnx", batch=0)
    for fields, message in (({"batch": True}, "at least one image.* got True"), ({"opset": "20"}, "opset .* got '20'")):
        with pytest.raises(InputError, match=message):
            export_onnx(model, tmp_path / "x.onnx", **fields)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(InputError, match="a directory to write in"):
            export_onnx(model, tmp_path / "x.onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "_exported", lambda *_: SimpleNamespace(model=SimpleNamespace(metadata_props={})))
        patch.setattr(tempfile, "mkdtemp", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(InputError, match=r"can be written, got .*No space left"):
            export_onnx(model, tmp_path / "x.onnx")
    with pytest.raises(InputError, match="existing directory"):
        export_onnx(model, tmp_path / "nowhere" / "x.onnx")
    with pytest.raises(InputError, match="a directory"):
        export_onnx(model, tmp_path)
    monkeypatch.setattr(onnx, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"pip install 'prunevit\[onnx\]'"):
        export_onnx(model, tmp_path / "x.onnx")
