"""Models that the loops can train."""

from stratagem.model.base import BaseModel, Trainable, parse_losses
from stratagem.model.norms import convert_sync_batchnorm, revert_sync_batchnorm
from stratagem.model.preprocess import BaseDataPreprocessor, to_device
from stratagem.model.ready import ModelWithLoss, SupervisedModel

__all__ = [
    "BaseDataPreprocessor",
    "BaseModel",
    "ModelWithLoss",
    "SupervisedModel",
    "Trainable",
    "convert_sync_batchnorm",
    "parse_losses",
    "revert_sync_batchnorm",
    "to_device",
]
