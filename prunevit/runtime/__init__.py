"""Running a pruned model in exactly its shape: pack, plan, engine."""

from .predict import Prediction
from .runtime import Runtime

__all__ = ["Prediction", "Runtime"]
