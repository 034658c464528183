"""The eager module of a spec, how timm's models become one, and how timm builds it."""

from . import registry  # the import registers timm's entrypoint
from .from_timm import from_timm, spec_of
from .vit import PrunedViT

__all__ = ["PrunedViT", "from_timm", "registry", "spec_of"]
