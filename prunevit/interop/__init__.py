"""Models from other pruners into prunevit, and out of it as ONNX."""

from .autoformer import from_autoformer, spec_from_autoformer
from .masks import from_masks, vit_slim_masks
from .nvit import from_nvit, spec_from_nvit
from .onnx import export_onnx
from .torch_pruning import from_torch_pruning

__all__ = [
    "export_onnx",
    "from_autoformer",
    "from_masks",
    "from_nvit",
    "from_torch_pruning",
    "spec_from_autoformer",
    "spec_from_nvit",
    "vit_slim_masks",
]
