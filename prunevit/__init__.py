"""prunevit: pruned Vision Transformers that are as fast as their operation count says.

pruned = prunevit.prune(model, method="snp", constraints={"macs": "45%"}, data=loader)
prunevit.save(pruned, "deit_small_snp")
logits = prunevit.Runtime("deit_small_snp")(images)

Names are imported when they are first used (PEP 562): the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _timm

if TYPE_CHECKING:
    from . import errors, shapes
    from .api import Runtime, gate, load, prune, save
    from .latency import Deployment
    from .models.from_timm import from_timm
    from .models.vit import PrunedViT
    from .nn import accelerate, restore
    from .spec import BlockSpec, TokenSelect, ViTSpec

    __version__: str

__all__ = [
    "BlockSpec",
    "Deployment",
    "PrunedViT",
    "Runtime",
    "TokenSelect",
    "ViTSpec",
    "accelerate",
    "errors",
    "from_timm",
    "gate",
    "load",
    "prune",
    "restore",
    "save",
    "shapes",
]

_HOMES = {
    **dict.fromkeys(("Runtime", "gate", "load", "prune", "save"), "api"),
    **dict.fromkeys(("BlockSpec", "TokenSelect", "ViTSpec"), "spec"),
    **dict.fromkeys(("accelerate", "restore"), "nn"),
    "Deployment": "latency",
    "PrunedViT": "models.vit",
    "from_timm": "models.from_timm",
}
_PARTS = {
    *("api", "benchmark", "checkpoint", "cli", "data", "errors", "interop", "latency", "models", "nn"),
    *("machine", "plots", "pruning", "runtime", "schema", "shapes", "spec"),
}

_timm.register_when_imported()


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _PARTS:
        value = import_module(f".{name}", __name__)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("prunevit")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS, "__version__"})
