"""What a checkpoint's ``config.json`` says: read by prunevit and by timm's entrypoint, and before a save writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError, SpecError
from ..spec import ViTSpec

LABELS = ("label_names", "label_descriptions")
DATA_FIELDS = (
    *("test_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", *LABELS),
    *("license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
)
OVERRIDES = ("num_classes", "in_chans", "img_size", "global_pool", "dynamic_img_size", "dynamic_img_pad")

Pixels = Annotated[int, Field(ge=1, le=2**14, strict=True)]
Mean = Annotated[float, Field(ge=-1e6, le=1e6, strict=True)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6, strict=True)]  # what pixels are divided by
Crop = Annotated[float, Field(ge=0.1, le=4, strict=True)]  # an image is enlarged by one over it first


@dataclass(frozen=True)
class Config:
    """What a ``config.json`` says, checked."""

    spec: ViTSpec
    pretrained_cfg: dict[str, Any]
    provenance: dict[str, Any]


class _DataConfig(BaseModel):
    """The fields of ``pretrained_cfg`` that reading images and labels relies on; others are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    input_size: tuple[Pixels, Pixels, Pixels]
    test_input_size: tuple[Pixels, Pixels, Pixels] | None = None
    mean: tuple[Mean, ...] = Field(default=(0.485,), min_length=1, max_length=4096)
    std: tuple[Deviation, ...] = Field(default=(0.229,), min_length=1, max_length=4096)
    interpolation: str = "bicubic"
    crop_pct: Crop = 0.875
    test_crop_pct: Crop | None = None
    crop_mode: str = "center"
    label_names: tuple[str, ...] | dict[str, str] | None = None
    label_descriptions: dict[str, str] | None = None


def config_of(data: Mapping[str, Any], file: str | Path) -> Config:
    """Check what a ``config.json`` holds. Raises :class:`CheckpointError` or :class:`SpecError`: field and reason."""
    if data.get("architecture") != "prunevit":
        raise CheckpointError(f"{file}: architecture: expected 'prunevit', got {data.get('architecture')!r:.60}")
    filled = {"prunevit": {}, "global_pool": "", **data}  # timm's own export leaves them out
    args, provenance, cfg = (_object(file, filled, name) for name in ("model_args", "prunevit", "pretrained_cfg"))
    cfg = {**cfg, **{name: data[name] for name in LABELS if name in data}}  # where timm's export puts given ones
    try:
        spec = ViTSpec.from_dict(_object(file, args, "spec"))
    except SpecError as error:
        raise SpecError(f"{file}: model_args.spec: {error}") from None
    stated = {"num_classes": spec.num_classes, "num_features": spec.embed_dim, "global_pool": spec.global_pool}
    for name, value in stated.items():
        if filled.get(name) != value:
            raise CheckpointError(f"{file}: {name}: expected {value!r} as the spec has, got {filled.get(name)!r:.60}")
    for name, value in args.items():  # timm takes them for overrides: they would make another model of the same file
        fixed = name in OVERRIDES and (list(value) if isinstance(value, list | tuple) else value)
        if name != "spec" and (name not in OVERRIDES or fixed != spec.to_dict()[name]):
            raise CheckpointError(f"{file}: model_args.{name}: expected nothing but the spec, got {value!r:.60}")
    try:
        checked = _DataConfig.model_validate(cfg)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{file}: pretrained_cfg.{where}: {first['msg']}, got {first['input']!r:.60}") from None
    size = (spec.in_chans, *spec.img_size)
    if checked.input_size != size:
        what = f"expected {list(size)} as the spec has, got {list(checked.input_size)}"
        raise CheckpointError(f"{file}: pretrained_cfg.input_size: {what}")
    for name, values in (("mean", checked.mean), ("std", checked.std)):
        if name in cfg and len(values) not in (1, spec.in_chans):
            what = f"expected one value, or {spec.in_chans} as the spec has channels, got {len(values)}"
            raise CheckpointError(f"{file}: pretrained_cfg.{name}: {what}")
    return Config(spec, cfg, provenance)


def _object(file: str | Path, data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: {name}: expected an object, got {value!r:.60}")
    return value


def pretrained_cfg_of(spec: ViTSpec, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """timm's data and classifier configuration of a spec; what ``base`` says of preprocessing and labels is kept."""
    base = base or {}
    kept = {name: base[name] for name in DATA_FIELDS if base.get(name) is not None}
    if base.get("num_classes", spec.num_classes) != spec.num_classes:
        kept = {name: value for name, value in kept.items() if not name.startswith("label_")}
    if not spec.dynamic_img_size:
        kept.pop("test_input_size", None)
    for name in ("mean", "std"):
        values = kept.get(name)
        if not isinstance(values, list | tuple) or any(not isinstance(value, int | float) for value in values):
            continue  # refused where it is read
        if len(values) not in (0, 1, spec.in_chans):  # timm changes a model's channels and leaves their statistics
            kept[name] = [fmean(values)] * spec.in_chans
    return {
        **kept,
        "architecture": "prunevit",
        "num_classes": spec.num_classes,
        "input_size": [spec.in_chans, *spec.img_size],
        "fixed_input_size": not spec.dynamic_img_size,
        "pool_size": None,
        "first_conv": "patch_embed.proj",
        "classifier": ["head", "head_dist"] if spec.distilled else "head",
    }
