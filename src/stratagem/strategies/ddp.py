"""The strategy for ``DistributedDataParallel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.parallel import Placement, Replicated
from stratagem.strategies.composed import ComposedStrategy
from stratagem.utils import did_you_mean

__all__ = ["DDPStrategy"]

# The names that configurations may use for each of the two wrapping modes.
_WHOLE = ("whole", "MMDistributedDataParallel", "DistributedDataParallel")
_SEPARATE = ("separate", "MMSeparateDistributedDataParallel")


@final
class DDPStrategy(ComposedStrategy):
    """Trains with ``DistributedDataParallel``: each rank has a replica of the model, and gradients are averaged.

    Args:
        model_wrapper: ``"whole"`` (the default), or ``"separate"`` to wrap each child module separately, for models
            with several optimizers; or a mapping with one of these values as ``type`` and options of
            ``DistributedDataParallel``.
        sync_bn: ``"torch"`` converts BatchNorm layers to SyncBatchNorm.
        ddp_kwargs: options of ``DistributedDataParallel``, such as ``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view`` and ``broadcast_buffers``, which can also be passed as arguments.
            ``broadcast_buffers`` defaults to False.
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
        **kwargs: Any,
    ) -> None:
        named = {
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "broadcast_buffers": broadcast_buffers,
            "bucket_cap_mb": bucket_cap_mb,
        }
        wrapper, options = _parse_wrapper(model_wrapper)
        self._separate = wrapper
        self._options = {
            **options,
            **(ddp_kwargs or {}),
            **{key: value for key, value in named.items() if value is not None},
        }
        self._sync_bn = sync_bn
        super().__init__(**kwargs)

    def _make_placement(self) -> Placement:
        self._require_processes()
        return Replicated(self.logger, sync_bn=self._sync_bn, separate=self._separate, options=self._options)


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
