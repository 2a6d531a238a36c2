"""Modules that wrap a model for distributed training.

A run does not need them: its strategy places the model. They exist for code that wraps a model itself, and for
``model_wrapper_cfg``.
"""

from stratagem.compat.mmengine.model.wrappers.distributed import MMDistributedDataParallel
from stratagem.compat.mmengine.model.wrappers.fully_sharded_distributed import MMFullyShardedDataParallel
from stratagem.compat.mmengine.model.wrappers.seperate_distributed import MMSeparateDistributedDataParallel
from stratagem.compat.mmengine.model.wrappers.utils import is_model_wrapper

__all__ = [
    "MMDistributedDataParallel",
    "MMFullyShardedDataParallel",
    "MMSeparateDistributedDataParallel",
    "is_model_wrapper",
]
