"""Determine the norm by which a plugin clips gradients."""

from __future__ import annotations

from stratagem.errors import ConfigValueError, PlacementError
from stratagem.optim.gradients import Clipping

__all__ = ["max_norm_of"]


def max_norm_of(clipping: Clipping | None, plugin_max_norm: float) -> float:
    """Return the maximum gradient norm, from the options of the optimizer wrapper and of the plugin; 0 for no clipping.

    Raises:
        PlacementError: if plugins do not support the type of clipping of the optimizer wrapper.
        ConfigValueError: if the two options differ.
    """
    if clipping is None:
        return plugin_max_norm
    if not clipping.by_norm or clipping.norm_type != 2.0:
        kind = f"norm_type={clipping.norm_type:g}" if clipping.by_norm else "type='value'"
        raise PlacementError(
            f"clip_grad: {kind} is not supported by ColossalAI's plugins, which clip by the 2-norm. Use "
            "clip_grad=dict(max_norm=...), or plugin='torch-ddp', which supports every type of clipping."
        )
    if plugin_max_norm and plugin_max_norm != clipping.limit:
        raise ConfigValueError(
            f"clip_grad=dict(max_norm={clipping.limit:g}) of the optimizer wrapper and max_norm={plugin_max_norm:g} of the "
            "plugin differ. Specify only one of them."
        )
    return clipping.limit
