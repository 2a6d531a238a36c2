"""The strategy for ``DistributedDataParallel``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.model.norms import require_sync_bn
from stratagem.parallel import Placement, Replicated
from stratagem.parallel.activation_checkpointing import parse_checkpointing
from stratagem.parallel.ddp import require_ddp_options
from stratagem.strategies.composed import ComposedStrategy
from stratagem.utils import did_you_mean

__all__ = ["DDPStrategy"]

# The names that configurations may use for each of the two wrapping modes.
_WHOLE = ("whole", "MMDistributedDataParallel", "DistributedDataParallel")
_SEPARATE = ("separate", "MMSeparateDistributedDataParallel")


_NAMED = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers", "bucket_cap_mb")


@final
@dataclass(frozen=True, slots=True)
class _DDPArguments:
    """The parsed arguments of a ``DDPStrategy``."""

    separate: bool
    options: Mapping[str, Any]
    sync_bn: str | None
    activation_checkpointing: Any

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> _DDPArguments:
        """Parse the arguments of a ``DDPStrategy``; all other arguments are ignored."""
        separate, options = _parse_wrapper(arguments.get("model_wrapper"))
        ddp_kwargs = arguments.get("ddp_kwargs")
        if ddp_kwargs is not None and not isinstance(ddp_kwargs, Mapping):
            raise ConfigTypeError(
                f"ddp_kwargs must be a mapping of options of DistributedDataParallel, got {ddp_kwargs!r}."
            )
        named = {name: arguments[name] for name in _NAMED if arguments.get(name) is not None}
        options = {**options, **(ddp_kwargs or {}), **named}
        require_ddp_options(options)
        sync_bn = arguments.get("sync_bn")
        if sync_bn is not None:
            require_sync_bn(sync_bn)
        activation_checkpointing = arguments.get("activation_checkpointing")
        parse_checkpointing(activation_checkpointing)
        return cls(separate, options, sync_bn, activation_checkpointing)


@final
class DDPStrategy(ComposedStrategy):
    """Trains with ``DistributedDataParallel``: each rank has a replica of the model, and gradients are averaged.

    Args:
        model_wrapper: ``"whole"`` (the default), or ``"separate"`` to wrap each child module separately, for models
            with several optimizers; or a mapping with one of these values as ``type`` and options of
            ``DistributedDataParallel``.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm.
        find_unused_parameters: whether each iteration looks for parameters that the loss does not depend on. Set it to True if
            only some of the parameters get gradients; it costs time.
        static_graph: whether every iteration uses the same parameters in the same order, which saves time and memory.
        gradient_as_bucket_view: whether gradients share the memory of the buffers that are reduced, which saves memory.
        broadcast_buffers: whether the buffers of rank 0 are sent to the other ranks before each forward pass; False by default.
        bucket_cap_mb: the size of these buffers in MiB.
        ddp_kwargs: options of ``DistributedDataParallel``, as a mapping; the arguments above can also be part of it.
        activation_checkpointing: which modules compute their activations again in the backward pass instead of storing them:
            True for the items of every ``ModuleList``; a class, the name of a class, or a list of them;
            ``dict(classes=...)``, ``dict(modules=["layers.*"])`` or ``dict(min_params=1_000_000)``; a function
            ``(name, module) -> bool``; or a mapping with such a ``policy``, ``save_ops`` and ``preserve_rng_state``. Losses and
            gradients do not change.
        kwargs: the arguments of :class:`BaseStrategy`.

    Raises:
        LaunchError: if no launcher started this process.
        ConfigKeyError: if an option is unknown.
    """

    def __init__(
        self,
        *,
        model_wrapper: str | Mapping[str, Any] | None = None,
        sync_bn: str | None = None,
        find_unused_parameters: bool | None = None,
        static_graph: bool | None = None,
        gradient_as_bucket_view: bool | None = None,
        broadcast_buffers: bool | None = None,
        bucket_cap_mb: float | None = None,
        ddp_kwargs: Mapping[str, Any] | None = None,
        activation_checkpointing: Any = None,
        **kwargs: Any,
    ) -> None:
        self._ddp = _DDPArguments.parse(
            {
                "model_wrapper": model_wrapper,
                "sync_bn": sync_bn,
                "find_unused_parameters": find_unused_parameters,
                "static_graph": static_graph,
                "gradient_as_bucket_view": gradient_as_bucket_view,
                "broadcast_buffers": broadcast_buffers,
                "bucket_cap_mb": bucket_cap_mb,
                "ddp_kwargs": ddp_kwargs,
                "activation_checkpointing": activation_checkpointing,
            }
        )
        super().__init__(**kwargs)

    @classmethod
    def check_arguments(cls, arguments: Mapping[str, Any]) -> None:
        _DDPArguments.parse(arguments)
        super().check_arguments(arguments)

    def _make_placement(self) -> Placement:
        self._require_processes()
        parsed = self._ddp
        return Replicated(
            self.logger,
            sync_bn=parsed.sync_bn,
            separate=parsed.separate,
            options=parsed.options,
            activation_checkpointing=parsed.activation_checkpointing,
        )


def _parse_wrapper(model_wrapper: str | Mapping[str, Any] | None) -> tuple[bool, dict[str, Any]]:
    """Return whether child modules are wrapped separately, and the options in ``model_wrapper``."""
    if model_wrapper is None:
        return False, {}
    if isinstance(model_wrapper, str):
        name, options = model_wrapper, {}
    elif isinstance(model_wrapper, Mapping):
        options = dict(model_wrapper)
        name = options.pop("type", "whole")
    else:
        raise ConfigTypeError(f"model_wrapper must be 'whole', 'separate' or a mapping, got {model_wrapper!r}.")
    if name not in (*_WHOLE, *_SEPARATE):
        raise ConfigValueError(
            f"model_wrapper: unknown type {name!r}. {did_you_mean(str(name), [*_WHOLE, *_SEPARATE])}"
        )
    return name in _SEPARATE, options
