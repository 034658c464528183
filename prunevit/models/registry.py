"""timm's entrypoint ``prunevit``: ``timm.create_model("local-dir:DIR", pretrained=True)`` once prunevit is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import PretrainedCfg, build_model_with_cfg, register_model
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from ..errors import CheckpointError, SpecError, expect
from ..spec import ViTSpec
from .config import OVERRIDES, config_of, pretrained_cfg_of
from .files import CONFIG, PLAN, WEIGHTS, read_json, read_plan, unreplaced
from .tensors import check_file, check_finite, check_shapes
from .vit import PrunedViT

SOURCES = ("source", "file", "hf_hub_id")


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
    if cfg.get("source") == "local-dir":
        return unreplaced(Path(str(cfg["file"])), lambda _: _created(source, cfg, pretrained, **kwargs))
    return _created(source, cfg, pretrained, **kwargs)


def _created(source: ViTSpec, cfg: dict[str, Any], pretrained: bool, **kwargs: Any) -> nn.Module:
    plan: dict[str, Any] | None = None
    provenance: dict[str, Any] = {}
    if (find := _finder(cfg, kwargs.get("cache_dir"))) is not None:
        file = find(CONFIG)
        config = config_of(read_json(file), file)
        expect(config.spec == source, CheckpointError, f"the spec of {file}", got="another one")
        # of the file nothing but what was checked: timm would obey a custom_load, a state_dict, another classifier
        cfg = {**pretrained_cfg_of(source, config.pretrained_cfg), **{n: cfg[n] for n in SOURCES if cfg.get(n)}}
        if pretrained:
            check_file(source, find(WEIGHTS))
            plan, provenance = read_plan(find(PLAN)), config.provenance
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
    built: Any = getattr(model, "model", model)  # features_only wraps it
    built.plan, built.provenance = plan, provenance
    return model


def _finder(cfg: Mapping[str, Any], cache_dir: str | Path | None) -> Callable[[str], Path] | None:
    """Finds the files of a checkpoint by name; None where weights come from nowhere that has any."""
    if cfg.get("source") == "local-dir":
        folder = Path(str(cfg["file"]))
        return lambda name: folder / name
    if cfg.get("source") != "hf-hub":
        return None

    def download(name: str) -> Path:
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(download_from_hf(cfg["hf_hub_id"], name, cache_dir))
        except EntryNotFoundError:
            return Path(cfg["hf_hub_id"], name)  # where nothing is

    return download


def _known_fields(cfg: PretrainedCfg | Mapping[str, Any]) -> dict[str, Any]:
    given: Mapping[str, Any] = cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg
    names = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return {name: value for name, value in given.items() if name in names}


def _build(source: ViTSpec, **kwargs: Any) -> PrunedViT:
    fields = {name: value for name in OVERRIDES if (value := kwargs.pop(name, None)) is not None}
    if "img_size" in fields:
        fields["img_size"] = tuple(to_2tuple(fields["img_size"]))
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
