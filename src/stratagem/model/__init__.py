"""Base classes of models, and operations on models: averaging, normalization layers, preprocessing and unwrapping."""

from stratagem.model.averaging import (
    AveragedModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from stratagem.model.base import BaseModel, Trainable, predict_step_of
from stratagem.model.norms import convert_sync_batchnorm, revert_sync_batchnorm
from stratagem.model.preprocess import BaseDataPreprocessor, pin_tensors, to_device
from stratagem.model.ready import ModelWithLoss, SupervisedModel
from stratagem.model.text import TextGenerator, Tokenizer
from stratagem.model.unwrap import is_model_wrapper, unwrap_model
from stratagem.step import parse_losses

__all__ = [
    "AveragedModel",
    "BaseDataPreprocessor",
    "BaseModel",
    "ExponentialMovingAverage",
    "ModelWithLoss",
    "MomentumAnnealingEMA",
    "StochasticWeightAverage",
    "SupervisedModel",
    "TextGenerator",
    "Tokenizer",
    "Trainable",
    "unwrap_model",
    "convert_sync_batchnorm",
    "is_model_wrapper",
    "parse_losses",
    "pin_tensors",
    "predict_step_of",
    "revert_sync_batchnorm",
    "to_device",
]
