"""A replica on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from stratagem.errors import ConfigTypeError, ConfigValueError
from stratagem.parallel import Placement, Replicated
from stratagem.strategies.composed import ComposedStrategy
from stratagem.utils import did_you_mean

__all__ = ["DDPStrategy"]

# How configurations name the two ways to wrap.
_WHOLE = ("whole", "MMDistributedDataParallel", "DistributedDataParallel")
_SEPARATE = ("separate", "MMSeparateDistributedDataParallel")


@final
class DDPStrategy(ComposedStrategy):
    """``DistributedDataParallel``: every rank holds the whole model and sees its own samples; gradients are averaged.

    Args:
        model_wrapper: ``"whole"`` (the default), or ``"separate"`` to wrap each child module by itself, for models with
            several optimizers; or a mapping with that as its ``type`` and options of ``DistributedDataParallel``.
        sync_bn: ``"torch"`` turns BatchNorm layers into SyncBatchNorm.
        ddp_kwargs: options of ``DistributedDataParallel`` (``find_unused_parameters``, ``static_graph``,
            ``gradient_as_bucket_view``, ``broadcast_buffers`` ...). ``broadcast_buffers`` is False unless given.
        kwargs: those of :class:`BaseStrategy`.

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
    """Return whether children are wrapped separately, and the options that came with the wrapper."""
    if model_wrapper is None:
        return False, {}
    if isinstance(model_wrapper, str):
        name, options = model_wrapper, {}
    elif isinstance(model_wrapper, Mapping):
        options = dict(model_wrapper)
        name = options.pop("type", "whole")
    else:
        raise ConfigTypeError(f"model_wrapper is {model_wrapper!r}; 'whole', 'separate' or a mapping is due.")
    if name not in (*_WHOLE, *_SEPARATE):
        raise ConfigValueError(
            f"model_wrapper: {name!r} is not known. {did_you_mean(str(name), [*_WHOLE, *_SEPARATE])}"
        )
    return name in _SEPARATE, options
