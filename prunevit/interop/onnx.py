"""ONNX: one self-contained file that ONNX Runtime, OpenVINO and others run.

The graph has the model's ragged shape: the heads of a layer are grouped by their widths, and each group is one batched
product, so that nothing is padded.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import model_of
from ..errors import InputError, MissingPackage, RuntimeMismatch, expect
from ..models.block import RaggedAttention
from ..models.vit import PrunedViT
from ..runtime import Runtime
from ..runtime.agreement import TOLERANCE, largest_error

MIN_OPSET, OPSET = 18, 20  # from 20 on GELU is one operator
MAX_BYTES = 2**31 - 2**20  # what a single protobuf file holds, with room for the graph


class _PlainAttention(RaggedAttention):
    """The products as they are: exporting PyTorch's fused attention would pad queries and values to one width."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        return (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def export_onnx(
    model: str | os.PathLike[str] | nn.Module,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    batch: int | None = None,
    check: bool = True,
) -> Path:
    """Write a checkpoint directory, a :class:`PrunedViT` or a timm ViT as one ONNX file, replacing it whole.

    The input is ``images`` [batch, C, H, W] in fp32, the output ``logits``; the batch is free unless ``batch`` fixes
    it. The spec is in the file's metadata under ``prunevit.spec``. ONNX's own checker reads it; ``check`` compares
    it with the runtime where ONNX Runtime is installed. Nothing is written if either refuses.

    Raises :class:`MissingPackage` without onnx and onnxscript, :class:`UnsupportedModel`, :class:`InputError`,
    :class:`RuntimeMismatch`.
    """
    require_packages("onnx", "onnxscript")
    from onnx.checker import check_model
    from onnx.defs import onnx_opset_version

    known = onnx_opset_version()
    fits = type(opset) is int and MIN_OPSET <= opset <= known
    expect(fits, InputError, f"an opset from {MIN_OPSET} to {known}", got=repr(opset))
    fits = batch is None or (type(batch) is int and batch >= 1)
    expect(fits, InputError, "a batch of at least one image, or None for any", got=repr(batch))
    path, given = Path(os.path.realpath(path)), Path(path)  # a link stays a link
    expect(not path.is_dir(), InputError, "the path of a file to write", got=f"{path}, a directory")
    expect(path.parent.is_dir(), InputError, "a file in an existing directory", got=path)
    expect(os.access(path.parent, os.W_OK | os.X_OK), InputError, "a directory to write in", got=path.parent)
    source = model_of(model)
    size = 4 * source.spec.params()
    expect(size <= MAX_BYTES, InputError, f"at most {MAX_BYTES} bytes of weights in one ONNX file", got=size)

    program = _exported(source, opset, batch)
    program.model.producer_name = "prunevit"
    program.model.metadata_props["prunevit.spec"] = json.dumps(source.spec.to_dict())
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            fresh = Path(folder) / "model.onnx"
            program.save(fresh, external_data=False)
            check_model(str(fresh))
            if check and find_spec("onnxruntime") is not None:
                _compare(fresh, source, batch)
            with fresh.open("rb") as file:
                os.fsync(file.fileno())
            fresh.replace(path)
    except OSError as error:
        raise InputError(f"expected a file that can be written, got {error}") from error
    return given


def require_packages(*names: str) -> None:
    """Raise :class:`MissingPackage` with the command that installs what is not there."""
    absent = [name for name in names if find_spec(name) is None]
    if absent:
        raise MissingPackage(f"expected {', '.join(absent)} to be installed: run `pip install 'prunevit[onnx]'`")


def _exported(source: PrunedViT, opset: int, batch: int | None) -> Any:
    spec = source.spec
    model = copy.deepcopy(source).cpu().float().eval()
    for module in model.modules():
        if isinstance(module, RaggedAttention):
            module.__class__ = _PlainAttention  # the same parameters, other products
    # two images: a batch of one would be taken for a constant
    images = torch.zeros(batch or 2, spec.in_chans, *spec.img_size, dtype=torch.float32)
    shapes = None if batch is not None else ({0: torch.export.Dim("batch")},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations are not its caller's
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            verbose=False,
        )
    assert program is not None
    exported: Any = program
    written = exported.model.opset_imports[""]  # of an opset that it does not know the exporter says nothing
    expect(written == opset, InputError, "an opset that the installed exporter writes", got=f"{opset}: lower it")
    size = exported.model.graph.inputs[0].shape[0]
    # a Python number taken from the batch anywhere in the model would make it a constant, without a word
    assert batch is not None or not isinstance(size, int), f"the exported graph has a fixed batch of {size}"
    return program


def _stable_sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """TopK of everything: the standard gives ties to the lower index, which is what stable means."""
    from onnxscript import opset18

    count = opset18.Shape(values, start=dim, end=dim + 1)
    return opset18.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


def _compare(file: Path, source: PrunedViT, batch: int | None) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    runtime = Runtime(source, device="cpu", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for size in (1, 3) if batch is None else (batch,):
        shape = (size, source.spec.in_chans, *source.spec.img_size)
        images = torch.randn(shape, generator=generator, dtype=torch.float32)
        want, got = runtime(images), torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        error = largest_error(got, want)
        if got.shape != want.shape or not error <= TOLERANCE:
            raise RuntimeMismatch(
                f"expected the ONNX file within {TOLERANCE:g} of the runtime's outputs, got {error:.3g} at batch "
                f"{size}: nothing was written"
            )
