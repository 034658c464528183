"""prunevit: pruned Vision Transformers that are as fast as their operation count says.

pruned = prunevit.prune(model, method="snp", constraints={"macs": "45%"}, data=loader)
prunevit.save(pruned, "deit_small_snp")
logits = prunevit.Runtime("deit_small_snp")(images)
"""

from importlib.metadata import version

from . import errors, shapes
from .api import Runtime, gate, load, prune, save
from .models import registry as _registry  # noqa: F401  # registers the timm entrypoint
from .models.from_timm import from_timm
from .models.vit import PrunedViT
from .nn import accelerate, restore
from .spec import BlockSpec, TokenSelect, ViTSpec

__version__ = version("prunevit")

__all__ = [
    "BlockSpec",
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
