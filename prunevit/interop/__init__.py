"""Models from other pruners into prunevit, and out of it as ONNX."""

from .onnx import export_onnx

__all__ = ["export_onnx"]
