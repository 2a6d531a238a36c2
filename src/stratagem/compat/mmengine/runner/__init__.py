"""The runner, its loops, and functions for checkpoints."""

from stratagem.compat.mmengine.runner._flexible_runner import FlexibleRunner
from stratagem.compat.mmengine.runner.activation_checkpointing import turn_on_activation_checkpointing
from stratagem.compat.mmengine.runner.amp import autocast
from stratagem.compat.mmengine.runner.base_loop import BaseLoop
from stratagem.compat.mmengine.runner.checkpoint import (
    CheckpointLoader,
    find_latest_checkpoint,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_state_dict,
    get_torchvision_models,
    load_checkpoint,
    load_state_dict,
    save_checkpoint,
    weights_to_cpu,
)
from stratagem.compat.mmengine.runner.log_processor import LogProcessor
from stratagem.compat.mmengine.runner.loops import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop
from stratagem.compat.mmengine.runner.priority import Priority, get_priority
from stratagem.compat.mmengine.runner.runner import Runner
from stratagem.compat.mmengine.runner.utils import set_random_seed

__all__ = [
    "BaseLoop",
    "CheckpointLoader",
    "EpochBasedTrainLoop",
    "FlexibleRunner",
    "IterBasedTrainLoop",
    "LogProcessor",
    "Priority",
    "Runner",
    "TestLoop",
    "ValLoop",
    "autocast",
    "find_latest_checkpoint",
    "get_deprecated_model_names",
    "get_external_models",
    "get_mmcls_models",
    "get_priority",
    "get_state_dict",
    "get_torchvision_models",
    "load_checkpoint",
    "load_state_dict",
    "save_checkpoint",
    "set_random_seed",
    "turn_on_activation_checkpointing",
    "weights_to_cpu",
]
