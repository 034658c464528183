"""timm's entrypoint ``prunevit``: ``timm.create_model("local-dir:DIR", pretrained=True)`` once prunevit is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models import PretrainedCfg, build_model_with_cfg, register_model
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from ..errors import SpecError
from ..spec import ViTSpec
from .origin import read_origin
from .tensors import check_file, check_finite, check_shapes
from .vit import PrunedViT

WEIGHTS = "model.safetensors"
DATA_FIELDS = (
    *("test_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std", "label_names"),
    *("label_descriptions", "license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
)
OVERRIDES = ("num_classes", "in_chans", "img_size", "global_pool", "dynamic_img_size", "dynamic_img_pad")


@register_model  # type: ignore[untyped-decorator]
def prunevit(
    pretrained: bool = False,
    *,
    spec: ViTSpec | Mapping[str, Any] | None = None,
    pretrained_cfg: PretrainedCfg | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a PrunedViT as timm builds its own models.

    ``spec`` comes from the checkpoint's ``model_args``. ``num_classes``, ``in_chans``, ``img_size`` and ``global_pool``
    replace its fields, and pretrained weights adapt as timm's do; ``features_only`` and dropout rates work as well.
    Raises :class:`SpecError` and :class:`CheckpointError`.
    """
    if spec is None:
        raise SpecError("spec: expected model_args with a spec, as prunevit's config.json has them, got none")
    source = spec if isinstance(spec, ViTSpec) else ViTSpec.from_dict(spec)
    cfg = _known_fields(pretrained_cfg) if pretrained_cfg else pretrained_cfg_of(source)
    if pretrained and cfg.get("source") == "local-dir":
        check_file(source, Path(str(cfg["file"])) / WEIGHTS)
    if cfg.get("source") == "hf-hub":
        cfg["hf_hub_filename"] = WEIGHTS  # named, so that timm never falls back to a pickle
    model: nn.Module = build_model_with_cfg(
        partial(_build, source),
        "prunevit",
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=partial(_adapt, source),
        feature_cfg={"out_indices": min(3, source.depth), "feature_cls": "getter"},
        **kwargs,
    )
    if pretrained and (found := _finder(cfg, kwargs.get("cache_dir"))) is not None:
        built: Any = getattr(model, "model", model)  # features_only wraps it
        built.plan, built.provenance = read_origin(found)
    return model


def _finder(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> Callable[[str], Path | None] | None:
    """Finds the files that lie beside a checkpoint's weights; None where weights come from nowhere that has any."""
    if cfg.get("source") == "local-dir":
        folder = Path(str(cfg["file"]))
        return lambda name: path if (path := folder / name).exists() else None
    if cfg.get("source") != "hf-hub":
        return None

    def download(name: str) -> Path | None:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(download_from_hf(cfg["hf_hub_id"], name, cache_dir))
        except EntryNotFoundError:
            return None

    return download


def pretrained_cfg_of(spec: ViTSpec, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """timm's data and classifier configuration of a spec; what ``base`` says of preprocessing and labels is kept."""
    base = base or {}
    kept = {name: base[name] for name in DATA_FIELDS if base.get(name) is not None}
    if base.get("num_classes", spec.num_classes) != spec.num_classes:
        kept = {name: value for name, value in kept.items() if not name.startswith("label_")}
    if not spec.dynamic_img_size:
        kept.pop("test_input_size", None)
    for name in ("mean", "std"):
        values = kept.get(name, ())
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


def _known_fields(cfg: PretrainedCfg | Mapping[str, Any]) -> dict[str, Any]:
    given: Mapping[str, Any] = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    names = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return {name: value for name, value in given.items() if name in names}


def _build(source: ViTSpec, **kwargs: Any) -> PrunedViT:
    fields = {name: value for name in OVERRIDES if (value := kwargs.pop(name, None)) is not None}
    size = fields.get("img_size")
    if size is not None:
        fields["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    if fields.get("global_pool", "map") != "map":
        fields["attn_pool"] = None
    return PrunedViT(source.replace(**fields), **kwargs)


def _adapt(source: ViTSpec, state: dict[str, Tensor], model: PrunedViT) -> dict[str, Tensor]:
    """Check a checkpoint's tensors against its own spec, then fit positions and pooling to the spec asked for."""
    check_shapes(source, {name: tuple(tensor.shape) for name, tensor in state.items()}, "pretrained weights")
    for name, tensor in state.items():
        check_finite(name, tensor, "pretrained weights")
    spec = model.spec
    if spec.grid_size != source.grid_size:
        state["pos_embed"] = resample_abs_pos_embed(
            state["pos_embed"],
            new_size=list(spec.grid_size),
            old_size=list(source.grid_size),
            num_prefix_tokens=source.num_prefix_positions,
        )
    if spec.attn_pool is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("attn_pool.")}
    return state
