"""The eager module of a spec, and how timm's models become one."""

from .from_timm import from_timm, spec_of
from .vit import PrunedViT

__all__ = ["PrunedViT", "from_timm", "spec_of"]
