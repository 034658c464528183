"""A hostile directory is refused by name: each attack takes a good one and makes it bad."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunevit import checkpoint
from prunevit.errors import CheckpointError, PrunevitError, SpecError
from prunevit.models import PrunedViT

from .directories import FILES, edit, saved


def _header(directory: Path) -> tuple[dict[str, Any], bytes]:
    raw = (directory / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def _with_header(directory: Path, change: Callable[[dict[str, Any]], object]) -> None:
    header, data = _header(directory)
    change(header)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def _with_state(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(directory / "model.safetensors")
    change(state)
    save_file(state, directory / "model.safetensors")


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda d: (d / name).write_bytes(content)


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    return lambda d: edit(d, change)


def _spec(**fields: Any) -> Callable[[Path], object]:
    return lambda d: edit(d, lambda c: c["model_args"]["spec"].update(fields))


def _huge_sparse(name: str, size: int) -> Callable[[Path], object]:
    def grow(directory: Path) -> None:
        with (directory / name).open("r+b") as file:
            file.truncate(size)

    return grow


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


QKV = "blocks.0.attn.qkv.weight"
ATTACKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_directory": (lambda d: shutil.rmtree(d), "expected a checkpoint directory, got none"),
    "no_config": (lambda d: (d / "config.json").unlink(), r"config\.json: expected a readable file"),
    "config_is_a_directory": (
        lambda d: ((d / "config.json").unlink(), (d / "config.json").mkdir()),
        r"config\.json: expected a readable file",
    ),
    "config_empty": (_write("config.json", b""), r"config\.json: expected JSON"),
    "config_truncated": (
        lambda d: (d / "config.json").write_bytes((d / "config.json").read_bytes()[:200]),
        r"config\.json: expected JSON",
    ),
    "config_not_text": (_write("config.json", b"\xff\xfe\x00{"), r"config\.json: expected JSON"),
    "config_a_list": (_write("config.json", b"[]"), r"config\.json: expected a JSON object, got list"),
    "config_a_pickle": (_write("config.json", b"\x80\x04cos\nsystem\n."), r"config\.json: expected JSON"),
    "config_nested_deep": (_write("config.json", b'{"a":' * 200_000), r"config\.json: expected JSON"),
    "config_number_with_a_million_digits": (
        _write("config.json", b'{"num_classes":' + b"9" * 1_000_000 + b"}"),
        r"config\.json: expected JSON",
    ),
    "config_with_nan": (_write("config.json", b'{"num_classes": NaN}'), r"config\.json: expected JSON.*NaN"),
    "config_with_one_key_twice": (_write("config.json", b'{"a": 1, "a": 2}'), "one key twice"),
    "config_of_a_gigabyte": (_huge_sparse("config.json", 2**30), r"config\.json: expected at most 16777216 bytes"),
    "another_architecture": (_config(lambda c: c.update(architecture="resnet50")), "architecture: expected 'prunevit'"),
    "no_model_args": (_config(lambda c: c.pop("model_args")), "model_args: expected an object"),
    "arguments_beside_the_spec": (
        _config(lambda c: c["model_args"].update(num_classes=5)),
        r"model_args\.num_classes: expected nothing but the spec, got 5",
    ),
    "spec_with_a_million_unknown_fields": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update({f"x{i}": 0 for i in range(200_000)})),
        r"expected at most 64 fields an object, got 2000\d\d",
    ),
    "spec_with_a_million_wrong_numbers": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update(attn_reads=[-1] * 65536)),
        r"blocks\.0\.attn_reads\.0: ",
    ),
    "no_spec": (_config(lambda c: c["model_args"].pop("spec")), "spec: expected an object"),
    "spec_a_list": (_config(lambda c: c["model_args"].update(spec=[])), "spec: expected an object"),
    "provenance_a_text": (_config(lambda c: c.update(prunevit="snp")), "prunevit: expected an object"),
    "later_format": (_spec(format_version=2), r"format_version: written by a later prunevit"),
    "spec_with_an_unknown_field": (_spec(code="import os"), r"code: Extra inputs"),
    "spec_of_absurd_width": (_spec(embed_dim=2**40), "embed_dim"),
    "spec_of_a_head_that_no_kernel_takes": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update(qk_dims=[129])),
        r"config\.json: model_args\.spec: .*blocks\.0\.qk_dims\.0: .* 128, got 129",
    ),
    "spec_larger_than_its_file": (
        _config(lambda c: c["model_args"]["spec"]["blocks"][0].update(mlp_dim=2**18)),
        r"model\.safetensors: expected at least \d+ bytes for \d+ parameters",
    ),
    "classes_not_the_specs": (_config(lambda c: c.update(num_classes=8)), "num_classes: expected 7 as the spec has"),
    "features_not_the_specs": (_config(lambda c: c.update(num_features=8)), "num_features: expected 29"),
    "pooling_not_the_specs": (_config(lambda c: c.update(global_pool="avg")), "global_pool: expected 'token'"),
    "no_pretrained_cfg": (_config(lambda c: c.pop("pretrained_cfg")), "pretrained_cfg: expected an object"),
    "input_size_not_the_specs": (
        _config(lambda c: c["pretrained_cfg"].update(input_size=[3, 64, 64])),
        r"pretrained_cfg\.input_size: expected \[3, 12, 16\]",
    ),
    "input_size_missing": (_config(lambda c: c["pretrained_cfg"].pop("input_size")), r"pretrained_cfg\.input_size"),
    "mean_a_text": (_config(lambda c: c["pretrained_cfg"].update(mean="0.5")), r"pretrained_cfg\.mean"),
    "deviation_zero": (_config(lambda c: c["pretrained_cfg"].update(std=[0, 0, 0])), r"pretrained_cfg\.std\.0"),
    "deviation_tiny": (_config(lambda c: c["pretrained_cfg"].update(std=[1e-300])), r"pretrained_cfg\.std\.0"),
    "mean_of_texts": (_config(lambda c: c["pretrained_cfg"].update(mean=["0.5"] * 3)), r"pretrained_cfg\.mean\.0"),
    "means_of_other_channels": (
        _config(lambda c: c["pretrained_cfg"].update(mean=[0.5] * 5)),
        r"pretrained_cfg\.mean: expected one value, or 3 as the spec has channels, got 5",
    ),
    "crop_of_a_hundredth": (_config(lambda c: c["pretrained_cfg"].update(crop_pct=0.01)), r"pretrained_cfg\.crop_pct"),
    "crop_negative": (_config(lambda c: c["pretrained_cfg"].update(crop_pct=-1)), r"pretrained_cfg\.crop_pct"),
    "labels_numbers": (_config(lambda c: c["pretrained_cfg"].update(label_names=[1])), r"pretrained_cfg\.label_names"),
    "no_weights": (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors: expected a file, got none"),
    "pickled_weights": (
        lambda d: torch.save({QKV: _Bomb()}, d / "model.safetensors"),
        r"model\.safetensors: expected",
    ),
    "weights_empty": (_write("model.safetensors", b""), r"model\.safetensors: expected at least"),
    "weights_truncated": (
        lambda d: _huge_sparse("model.safetensors", (d / "model.safetensors").stat().st_size - 1)(d),
        r"model\.safetensors: expected a safetensors file",
    ),
    "weights_with_a_tail": (
        lambda d: _huge_sparse("model.safetensors", (d / "model.safetensors").stat().st_size + 64)(d),
        r"model\.safetensors: expected a safetensors file",
    ),
    "header_of_absurd_size": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{" * 100_000),
        r"model\.safetensors: expected a safetensors file",
    ),
    "header_of_a_million_names": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 2**24) + b"{".ljust(2**24)),
        r"model\.safetensors: expected a safetensors file with a header of at most \d{7} bytes, got 16777216",
    ),
    "header_not_json": (
        lambda d: (d / "model.safetensors").write_bytes(struct.pack("<Q", 100) + b"\xff" * 100_000),
        r"model\.safetensors: expected a safetensors file",
    ),
    "offsets_beyond_the_file": (
        lambda d: _with_header(d, lambda h: h[QKV].update(data_offsets=[0, 2**50])),
        r"model\.safetensors: expected a safetensors file",
    ),
    "offsets_that_overlap": (
        lambda d: _with_header(d, lambda h: h[QKV].update(data_offsets=h["blocks.0.attn.qkv.bias"]["data_offsets"])),
        r"model\.safetensors: expected a safetensors file",
    ),
    "shape_that_overflows": (
        lambda d: _with_header(d, lambda h: h[QKV].update(shape=[2**40, 2**40])),
        r"model\.safetensors: expected a safetensors file",
    ),
    "shape_transposed": (
        lambda d: _with_header(d, lambda h: h[QKV].update(shape=h[QKV]["shape"][::-1])),
        r"blocks\.0\.attn\.qkv\.weight: expected shape \[60, 29\], got \[29, 60\]",
    ),
    "tensor_missing": (
        lambda d: _with_state(d, lambda s: s.update({"padding": s.pop(QKV)})),
        r"blocks\.0\.attn\.qkv\.weight: expected a tensor \[60, 29\], which is missing",
    ),
    "tensor_extra": (
        lambda d: _with_state(d, lambda s: s.update(payload=torch.zeros(3))),
        r"payload: expected no such tensor of this spec, got \[3\]",
    ),
    "tensor_of_integers": (
        lambda d: _with_state(d, lambda s: s.update({QKV: s[QKV].to(torch.int32)})),
        r"blocks\.0\.attn\.qkv\.weight: expected one of F64, F32, F16, BF16, the same for all, got I32",
    ),
    "tensor_of_another_dtype": (
        lambda d: _with_state(d, lambda s: s.update({QKV: s[QKV].double()})),
        r"expected one of F64, F32, F16, BF16, the same for all",
    ),
    "weights_nan": (
        lambda d: _with_state(d, lambda s: s[QKV].view(-1)[7:8].fill_(float("nan"))),
        r"blocks\.0\.attn\.qkv\.weight: expected finite weights",
    ),
    "weights_infinite": (
        lambda d: _with_state(d, lambda s: s["pos_embed"].view(-1)[0:1].fill_(float("-inf"))),
        "pos_embed: expected finite weights",
    ),
    "plan_truncated": (_write("plan.json", b'{"heads": '), r"plan\.json: expected JSON"),
    "plan_of_a_gigabyte": (_huge_sparse("plan.json", 2**30), r"plan\.json: expected at most 16777216 bytes"),
    "plan_a_pipe": (
        lambda d: ((d / "plan.json").unlink(), os.mkfifo(d / "plan.json")),
        r"plan\.json: expected a regular file",
    ),
    "plan_a_list": (_write("plan.json", b"[]"), r"plan\.json: expected a JSON object"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_refused_before_memory_is_allocated(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = ATTACKS[attack]
    saved(tmp_path / "vit")
    change(tmp_path / "vit")

    def built(spec: object, *, device: str | None = None) -> PrunedViT:
        assert device == "meta", "a model was allocated"
        return PrunedViT(spec, device=device)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "PrunedViT", built)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    with pytest.raises((CheckpointError, SpecError), match=message) as caught:
        checkpoint.load(tmp_path / "vit")
    assert len(str(caught.value)) < 1000


def test_the_attacked_directory_was_good(tmp_path: Path) -> None:
    """Else the attacks above would be refused for another reason."""
    saved(tmp_path / "vit")
    edit(tmp_path / "vit", lambda c: c)
    _with_state(tmp_path / "vit", lambda s: s)
    _with_header(tmp_path / "vit", lambda h: h)
    checkpoint.load(tmp_path / "vit")


@pytest.mark.parametrize("file", FILES)
def test_any_flipped_byte_loads_or_is_refused_by_name(file: str, tmp_path: Path) -> None:
    saved(tmp_path / "vit", "one_head_13_by_12")
    good = (tmp_path / "vit" / file).read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, min(len(good), 3000), (60,), generator=generator).tolist()
    refused = 0
    for place in places:
        (tmp_path / "vit" / file).write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        try:
            checkpoint.load(tmp_path / "vit")
        except PrunevitError:
            refused += 1
    assert refused > 20 or file == "model.safetensors"
