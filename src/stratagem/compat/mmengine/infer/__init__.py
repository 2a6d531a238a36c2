"""Predict with a trained model."""

from stratagem.compat.mmengine.infer.infer import BaseInferencer

__all__ = ["BaseInferencer"]
