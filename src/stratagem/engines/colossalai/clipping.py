"""Clipping is said in the optimizer wrapper or in the plugin, and done by the plugin where it can."""

from __future__ import annotations

from stratagem.errors import ConfigValueError, PlacementError
from stratagem.optim.gradients import Clipping

__all__ = ["max_norm_of"]


def max_norm_of(clipping: Clipping | None, plugin_max_norm: float) -> float:
    """Return by which norm the plugin clips, from what the optimizer wrapper says and what the plugin says; 0 for none.

    Raises:
        PlacementError: if the wrapper asks for a kind of clipping that plugins do not have.
        ConfigValueError: if both say something else.
    """
    if clipping is None:
        return plugin_max_norm
    if not clipping.by_norm or clipping.norm_type != 2.0:
        kind = f"norm_type={clipping.norm_type:g}" if clipping.by_norm else "type='value'"
        raise PlacementError(
            f"clip_grad: {kind} cannot be had from ColossalAI's plugins, which clip by the norm of order 2: "
            "clip_grad=dict(max_norm=...). plugin='torch-ddp' takes every kind."
        )
    if plugin_max_norm and plugin_max_norm != clipping.limit:
        raise ConfigValueError(
            f"clip_grad=dict(max_norm={clipping.limit:g}) of the optimizer wrapper and max_norm={plugin_max_norm:g} of the "
            "plugin differ. Give one of them."
        )
    return clipping.limit
