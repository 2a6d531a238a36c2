"""DeepSpeed itself, with its traps set aside: what must hold before it is imported, and before it makes an engine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from stratagem.distributed import World
from stratagem.engines.deepspeed.scalar_params import as_vectors, broadcast_already
from stratagem.errors import ConfigValueError, PlacementError
from stratagem.utils import import_module

__all__ = ["configure_checkpointing", "load_deepspeed", "make_engine", "require_dtype"]

# What the arguments of DeepSpeed's function are called in its configurations.
_CHECKPOINTING: Final = {
    "partition_activations": "partition_activations",
    "cpu_checkpointing": "checkpoint_in_cpu",
    "contiguous_memory_optimization": "contiguous_checkpointing",
    "number_checkpoints": "num_checkpoints",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}
_LOGGER: Final = "DeepSpeed"


def load_deepspeed(world: World) -> ModuleType:
    """Import DeepSpeed and let it use the process group that there is.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    if world.device.type == "cpu":
        # Where it looks for an accelerator itself, it may find one that this run does not use.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It reads them again and again, and not every launcher sets them.
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    deepspeed = import_module("deepspeed", extra="deepspeed")
    # It would compile an operator for exchange in shared master_weights; where that was ever interrupted, all later runs wait for
    # the lock that it left.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Its notes are many, and on every rank.
    logging.getLogger(_LOGGER).setLevel(logging.WARNING)
    # It calls functions of torch by names that torch renames, and each rank would say so.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # What it keeps of a process group is that of a strategy before this one.
    deepspeed.utils.groups._release_process_group_references(group=None)
    deepspeed.comm.comm.cdb = None
    deepspeed.init_distributed(dist_init_required=True, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def require_dtype(deepspeed: ModuleType, dtype: torch.dtype | None) -> None:
    """Refuse a 16-bit dtype that DeepSpeed does not support on this device.

    Raises:
        ConfigValueError: if it does not. On CPUs, DeepSpeed requires float16 instructions for float16.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    is_supported = {torch.float16: accelerator.is_fp16_supported, torch.bfloat16: accelerator.is_bf16_supported}
    if dtype in is_supported and not is_supported[dtype]():
        name, other = ("fp16", "bf16") if dtype == torch.float16 else ("bf16", "fp16")
        raise ConfigValueError(
            f"{name} is enabled, and DeepSpeed does not support {dtype} on this device ({accelerator.device_name()}). "
            f"Set {other}=True, or leave both out to train in float32."
        )


def make_engine(
    deepspeed: ModuleType, model: nn.Module, optimizer: Optimizer, config: Mapping[str, Any], *, cuts_parameters: bool
) -> Any:
    """Return the engine that trains ``model`` with ``optimizer``; it changes both. Collective.

    All ranks have the same weights already.

    Raises:
        ConfigValueError: if DeepSpeed refuses the configuration.
    """
    own = {"log_level": "warning", **config}
    try:
        with as_vectors(model) if cuts_parameters else broadcast_already(model):
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=own, dist_init_required=False)[0]
    except (AssertionError, ValueError) as error:
        raise ConfigValueError(f"DeepSpeed refuses its configuration: {error}") from error
    _refuse_direct_backward(engine)
    return engine


def _refuse_direct_backward(engine: Any) -> None:
    """Have a backward pass that the engine was not asked for raise: accumulation and loss scaling would not apply to it."""
    begin = engine._backward_prologue

    def begin_if_asked() -> None:
        if not engine._running_engine_backward:
            raise PlacementError(
                "A backward pass through the model was started without the optimizer wrapper. Under DeepSpeed call "
                "optim_wrapper.update_params(loss) or optim_wrapper.backward(loss) instead of loss.backward(), and take no "
                "gradients with torch.autograd.grad."
            )
        begin()

    engine._backward_prologue = begin_if_asked


def configure_checkpointing(deepspeed: ModuleType, options: Mapping[str, Any] | None) -> None:
    """Set what ``deepspeed.checkpointing.checkpoint`` does in models that call it."""
    if options is not None:
        deepspeed.checkpointing.configure(None, **{_CHECKPOINTING[key]: value for key, value in options.items()})
