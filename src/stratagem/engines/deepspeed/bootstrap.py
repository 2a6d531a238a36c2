"""Import DeepSpeed, create its engine, and work around its side effects."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from stratagem.distributed import World
from stratagem.errors import ConfigValueError, PlacementError
from stratagem.utils import import_module

__all__ = ["configure_checkpointing", "load_deepspeed", "make_engine", "require_dtype", "restore_linear"]

# Configuration keys -> arguments of deepspeed.checkpointing.configure().
_CHECKPOINTING: Final = {
    "partition_activations": "partition_activations",
    "cpu_checkpointing": "checkpoint_in_cpu",
    "contiguous_memory_optimization": "contiguous_checkpointing",
    "number_checkpoints": "num_checkpoints",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}
_LOGGER: Final = "DeepSpeed"
# DeepSpeed does not broadcast parameters with this attribute, because it marks parameters that differ between ranks.
_EXCLUDE_FROM_BROADCAST: Final = "ds_optim_param"


def load_deepspeed(world: World) -> ModuleType:
    """Import DeepSpeed and initialize it with the existing process group.

    Raises:
        MissingDependencyError: if DeepSpeed is not installed.
    """
    if world.device.type == "cpu":
        # Without this variable, DeepSpeed may detect an accelerator that this run does not use.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed reads these variables repeatedly, and some launchers do not set them.
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    deepspeed = import_module("deepspeed", extra="deepspeed")
    # DeepSpeed would compile an operator for shared-memory communication. If the compilation is ever interrupted, all later
    # runs wait for the lock that it left behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed logs many messages on every rank.
    logging.getLogger(_LOGGER).setLevel(logging.WARNING)
    # DeepSpeed calls deprecated torch functions, which would emit warnings on every rank.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Remove references to the process group of an earlier strategy.
    deepspeed.utils.groups._release_process_group_references(group=None)
    deepspeed.comm.comm.cdb = None
    deepspeed.init_distributed(dist_init_required=True, auto_mpi_discovery=False, verbose=False)
    return deepspeed


def require_dtype(deepspeed: ModuleType, dtype: torch.dtype | None) -> None:
    """Reject a 16-bit dtype that DeepSpeed does not support on this device.

    Raises:
        ConfigValueError: if the dtype is not supported. On a CPU, DeepSpeed supports float16 only if the CPU has
            float16 instructions.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    is_supported = {torch.float16: accelerator.is_fp16_supported, torch.bfloat16: accelerator.is_bf16_supported}
    if dtype in is_supported and not is_supported[dtype]():
        name, other = ("fp16", "bf16") if dtype == torch.float16 else ("bf16", "fp16")
        raise ConfigValueError(
            f"{name} is enabled, but DeepSpeed does not support {dtype} on this device ({accelerator.device_name()}). "
            f"Set {other}=True, or omit both to train in float32."
        )


def make_engine(
    deepspeed: ModuleType, model: nn.Module, optimizer: Optimizer, config: Mapping[str, Any], *, shards_parameters: bool
) -> Any:
    """Return an engine that trains ``model`` with ``optimizer`` and modifies both. Collective.

    The weights must already be equal on all ranks.

    Raises:
        ConfigValueError: if DeepSpeed rejects the configuration.
    """
    options = {"log_level": "warning", **config}
    try:
        with _scalars_as_vectors(model) if shards_parameters else _skip_broadcast(model):
            engine = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)[0]
    except (AssertionError, ValueError) as error:
        raise ConfigValueError(f"DeepSpeed rejected its configuration: {error}") from error
    _refuse_direct_backward(engine)
    return engine


def restore_linear() -> None:
    """Undo that stage 3 replaces ``nn.functional.linear`` for the rest of the process.

    Its replacement computes the gradients of linear layers in another order. Engines of stage 3 that still train then use torch's
    function, as with ``memory_efficient_linear: false``.
    """
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if module is not None and nn.functional.linear is module.zero3_linear_wrap:
        nn.functional.linear = module.InsertPostInitMethodToModuleSubClasses.linear_bk


@contextmanager
def _skip_broadcast(model: nn.Module) -> Iterator[None]:
    """Prevent an engine that is created inside the ``with`` block from broadcasting the weights of rank 0 again."""
    parameters = list(model.parameters())
    for parameter in parameters:
        setattr(parameter, _EXCLUDE_FROM_BROADCAST, True)
    try:
        yield
    finally:
        for parameter in parameters:
            delattr(parameter, _EXCLUDE_FROM_BROADCAST)


@contextmanager
def _scalars_as_vectors(model: nn.Module) -> Iterator[None]:
    """Give scalar parameters the shape ``(1,)`` while stage 3 shards parameters, since DeepSpeed 0.19 cannot shard scalars.

    Afterwards, gathering them returns scalars.
    """
    scalars: list[Any] = [parameter for parameter in model.parameters() if parameter.ndim == 0]
    for scalar in scalars:
        scalar.data = scalar.data.view(1)
    yield
    for scalar in scalars:
        scalar.ds_shape = torch.Size()
        if scalar.numel():
            scalar.data = scalar.data.view(())


def _refuse_direct_backward(engine: Any) -> None:
    """Make the engine reject backward passes that bypass it, because they would also bypass accumulation and loss scaling."""
    begin = engine._backward_prologue

    def checked_begin() -> None:
        if not engine._running_engine_backward:
            raise PlacementError(
                "A backward pass through the model was started without the optimizer wrapper. Under DeepSpeed, call "
                "optim_wrapper.update_params(loss) or optim_wrapper.backward(loss) instead of loss.backward(), and do not use "
                "torch.autograd.grad."
            )
        begin()

    engine._backward_prologue = checked_begin


def configure_checkpointing(deepspeed: ModuleType, options: Mapping[str, Any] | None) -> None:
    """Configure ``deepspeed.checkpointing.checkpoint`` for models that call it."""
    if options is not None:
        deepspeed.checkpointing.configure(None, **{_CHECKPOINTING[key]: value for key, value in options.items()})
