"""Sharded data parallelism with the interface of a model, for code that wraps a model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import (
    BackwardPrefetch,
    CPUOffload,
    FullyShardedDataParallel,
    MixedPrecision,
    ShardingStrategy,
)

from stratagem.compat.mmengine.model.wrappers.distributed import losses_of
from stratagem.compat.mmengine.registry import FUNCTIONS, MODEL_WRAPPERS
from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.step import call_forward

__all__ = ["MMFullyShardedDataParallel"]

EnumT = TypeVar("EnumT", bound=Enum)


@MODEL_WRAPPERS.register_module()
class MMFullyShardedDataParallel(FullyShardedDataParallel):
    """torch's ``FullyShardedDataParallel`` with options that a configuration can express, and the methods of the model.

    A run shards its model with ``fully_shard`` instead, if its configuration has ``strategy=dict(type="FSDPStrategy")``.

    Args:
        module: the model.
        process_group: see ``FullyShardedDataParallel``.
        sharding_strategy: a ``ShardingStrategy`` or its name.
        cpu_offload: whether parameters are kept in CPU memory, or a ``CPUOffload``.
        auto_wrap_policy: a function, its name in the registry ``FUNCTIONS``, or a dict with the name or the function under
            ``type`` and its arguments.
        backward_prefetch: a ``BackwardPrefetch`` or its name.
        mixed_precision: a ``MixedPrecision`` or its arguments, in which dtypes may be names.
        param_init_fn: like ``auto_wrap_policy``.
        use_orig_params: see ``FullyShardedDataParallel``.
        kwargs: other arguments of ``FullyShardedDataParallel``; ``ignored_parameters`` and ``ignored_modules`` may be names.

    Raises:
        ConfigTypeError: if an option has another type.
        ConfigValueError: if a function is not registered.
    """

    def __init__(
        self,
        module: nn.Module,
        process_group: ProcessGroup | None = None,
        sharding_strategy: str | ShardingStrategy | None = None,
        cpu_offload: bool | CPUOffload | None = None,
        auto_wrap_policy: str | dict[str, Any] | Callable[..., Any] | None = None,
        backward_prefetch: str | BackwardPrefetch | None = None,
        mixed_precision: dict[str, Any] | MixedPrecision | None = None,
        param_init_fn: str | dict[str, Any] | Callable[[nn.Module], None] | None = None,
        use_orig_params: bool = True,
        **kwargs: Any,
    ) -> None:
        if "ignored_parameters" in kwargs:
            known: dict[str, Any] = dict(module.named_parameters())
            kwargs["ignored_parameters"] = _named("ignored_parameters", kwargs["ignored_parameters"], known)
        if "ignored_modules" in kwargs:
            known = dict(module.named_modules())
            kwargs["ignored_modules"] = _named("ignored_modules", kwargs["ignored_modules"], known)
        super().__init__(
            module=module,
            process_group=process_group,
            sharding_strategy=_member("sharding_strategy", sharding_strategy, ShardingStrategy),
            cpu_offload=_offload(cpu_offload),
            auto_wrap_policy=_function("auto_wrap_policy", auto_wrap_policy),
            backward_prefetch=_member("backward_prefetch", backward_prefetch, BackwardPrefetch),
            mixed_precision=_precision(mixed_precision),
            param_init_fn=_function("param_init_fn", param_init_fn),
            use_orig_params=use_orig_params,
            **kwargs,
        )

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """Train on one batch and return the values to log. Collective."""
        loss, log_vars = losses_of(self, data, optim_wrapper)
        optim_wrapper.update_params(loss)
        return log_vars

    def val_step(self, data: Any) -> Any:
        """Return the predictions for one batch. Collective."""
        model: Any = self.module
        return call_forward(self, model.data_preprocessor(data, False), "predict")

    def test_step(self, data: Any) -> Any:
        """Return the predictions for one batch. Collective."""
        return self.val_step(data)


def _member(name: str, value: Any, kind: type[EnumT]) -> EnumT | None:
    if isinstance(value, str):
        return kind[value]
    if value is None or isinstance(value, kind):
        return value
    raise ConfigTypeError(f"{name} must be a {kind.__name__} or its name, got {value!r}.")


def _offload(value: Any) -> CPUOffload | None:
    if isinstance(value, bool):
        return CPUOffload(offload_params=value)
    if value is None or isinstance(value, CPUOffload):
        return value
    raise ConfigTypeError(f"cpu_offload must be a bool or a CPUOffload, got {value!r}.")


def _function(name: str, value: Any) -> Callable[..., Any] | None:
    options: dict[str, Any] = {}
    if isinstance(value, dict):
        options = {key: each for key, each in value.items() if key != "type"}
        value = value.get("type")
        if value is None:
            raise ConfigValueError(f"{name} has no type. Add the name of a function: type=...")
    if isinstance(value, str):
        with FUNCTIONS.switch_scope_and_registry(None) as registry:
            found = registry.get(value)
        if found is None:
            raise ConfigValueError(f"{name}: {value!r} is not registered in FUNCTIONS.")
        value = found
    if value is not None and not callable(value):
        raise ConfigTypeError(f"{name} must be a function, its name or a dict, got {value!r}.")
    return partial(value, **options) if options else value


def _precision(value: Any) -> MixedPrecision | None:
    if isinstance(value, dict):
        dtypes = {key: _dtype(value.get(key)) for key in ("param_dtype", "reduce_dtype", "buffer_dtype")}
        return MixedPrecision(**{**value, **dtypes})
    if value is None or isinstance(value, MixedPrecision):
        return value
    raise ConfigTypeError(f"mixed_precision must be a MixedPrecision or its arguments, got {value!r}.")


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value, value) if isinstance(value, str) else value
    if found is None or isinstance(found, torch.dtype):
        return found
    raise ConfigTypeError(f"mixed_precision: a dtype must be a torch.dtype or its name, got {value!r}.")


def _named(name: str, given: Iterable[Any] | None, known: dict[str, Any]) -> list[Any] | None:
    """Return the modules or parameters that are given as objects or by name."""
    if given is None:
        return None
    found = [known.get(each, each) if isinstance(each, str) else each for each in given]
    for each in found:
        if not isinstance(each, nn.Module | nn.Parameter):
            raise ConfigTypeError(f"{name}: the model has no {each!r}.")
    return found
