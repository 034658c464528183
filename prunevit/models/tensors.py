"""The tensors that a spec calls for, checked against those of an untrusted file before anything large is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..spec import ViTSpec
from .vit import PrunedViT

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@lru_cache(maxsize=8)  # a model is built for it, and an accelerated one is looked at after each change
def expected_shapes(spec: ViTSpec) -> Mapping[str, tuple[int, ...]]:
    """Name and shape of every tensor of a spec's state dict."""
    return shapes_of(PrunedViT(spec, device="meta"))


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a model's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_file(spec: ViTSpec, path: Path) -> None:
    """Raise :class:`CheckpointError` unless a safetensors file holds a spec's tensors. Reads its header only."""
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, got none; only safetensors weights are read")
    size, params = path.stat().st_size, spec.params()
    if size < 2 * params:
        raise CheckpointError(f"{path}: expected at least {2 * params} bytes for {params} parameters, got {size}")
    expected = expected_shapes(spec)
    most = 2**20 + 512 * len(expected)
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if length > most:  # a million names take seconds and gigabytes to read
            what = f"expected a safetensors file with a header of at most {most} bytes, got {length}"
            raise CheckpointError(f"{path}: {what}")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, got {error}") from None
    match_shapes(expected, shapes, str(path))
    for name, dtype in dtypes.items():
        first = next(iter(dtypes.values()))
        if dtype not in FLOATS or dtype != first:
            raise CheckpointError(f"{path}: {name}: expected one of {', '.join(FLOATS)}, the same for all, got {dtype}")


def check_shapes(spec: ViTSpec, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise :class:`CheckpointError` where names or shapes are not those of the spec."""
    match_shapes(expected_shapes(spec), found, where)


def match_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise :class:`CheckpointError` at the first name or shape that differs."""
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(f"{where}: {name}: expected a tensor {list(shape)}, which is missing")
        if found[name] != shape:
            raise CheckpointError(f"{where}: {name}: expected shape {list(shape)}, got {list(found[name])}")
    for name, shape in found.items():
        if name not in expected:
            raise CheckpointError(f"{where}: {name}: expected no such tensor of this spec, got {list(shape)}")


def check_state(spec: ViTSpec, state: Mapping[str, Tensor], where: str) -> None:
    """Raise :class:`CheckpointError` for tensors that no checkpoint of this spec holds."""
    check_shapes(spec, {name: tuple(tensor.shape) for name, tensor in state.items()}, where)
    first = next(iter(state.values())).dtype
    for name, tensor in state.items():
        if tensor.dtype not in FLOATS.values() or tensor.dtype != first:
            raise CheckpointError(
                f"{where}: {name}: expected one of {', '.join(FLOATS)}, the same for all, got {tensor.dtype} "
                f"beside {first}"
            )
        check_finite(name, tensor, where)


def check_finite(name: str, tensor: Tensor, where: str) -> Tensor:
    """Raise :class:`CheckpointError` for NaN or infinite weights."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{where}: {name}: expected finite weights, got NaN or infinity")
    return tensor
