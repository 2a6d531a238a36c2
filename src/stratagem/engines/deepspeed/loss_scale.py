"""Read and write DeepSpeed's loss scale in the state format of ``torch.amp.GradScaler``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = ["read_loss_scale", "write_loss_scale"]

_FACTOR: Final = 2.0
# This key does not exist in torch's format.
_HYSTERESIS: Final = "hysteresis"


def read_loss_scale(optimizer: Any) -> dict[str, Any]:
    """Return the loss-scale state of a DeepSpeed optimizer, in any stage."""
    scaler = _scaler(optimizer)
    state: dict[str, Any] = {"scale": float(scaler.cur_scale), "growth_factor": _FACTOR, "backoff_factor": 1 / _FACTOR}
    if not _is_dynamic(scaler):
        return {**state, "growth_interval": 1, "_growth_tracker": 0}
    steps_since_overflow = scaler.cur_iter - scaler.last_overflow_iter - 1
    state |= {"growth_interval": scaler.scale_window, "_growth_tracker": steps_since_overflow}
    return state if _hysteresis(scaler) is None else {**state, _HYSTERESIS: _hysteresis(scaler)}


def write_loss_scale(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Restore a loss scale saved by DeepSpeed or torch. A static loss scale is not changed."""
    scaler = _scaler(optimizer)
    if not _is_dynamic(scaler):
        return
    scaler.cur_scale = float(state["scale"])
    # Only the difference between the two counters matters.
    scaler.last_overflow_iter = -1
    scaler.cur_iter = int(state["_growth_tracker"])
    if _HYSTERESIS in state and _hysteresis(scaler) is not None:
        scaler.cur_hysteresis = int(state[_HYSTERESIS])


def _scaler(optimizer: Any) -> Any:
    # Stage 0 stores the value in a different attribute.
    config = getattr(optimizer, "loss_scale_config", None)
    return optimizer.loss_scaler if config is None else config


def _is_dynamic(scaler: Any) -> bool:
    return bool(getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False)))


def _hysteresis(scaler: Any) -> int | None:
    return getattr(scaler, "cur_hysteresis", None)
