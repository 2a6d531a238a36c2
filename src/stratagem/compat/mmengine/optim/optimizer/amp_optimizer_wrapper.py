"""Mixed precision with MMEngine's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.logging import print_log
from stratagem.compat.mmengine.optim.optimizer.optimizer_wrapper import OptimWrapper
from stratagem.compat.mmengine.registry import OPTIM_WRAPPERS
from stratagem.errors import ConfigTypeError
from stratagem.optim.amp import AmpOptimWrapper as _AmpOptimWrapper
from stratagem.optim.amp import parse_dtype

__all__ = ["AmpOptimWrapper"]


@OPTIM_WRAPPERS.register_module()
class AmpOptimWrapper(OptimWrapper, _AmpOptimWrapper):
    """Run the forward pass under autocast, as ``stratagem.optim.AmpOptimWrapper`` does, on the CPU as well.

    Args:
        loss_scale: the loss scale for float16: ``"dynamic"``, a constant, or the arguments of ``GradScaler``. bfloat16 needs
            none, so the option has no effect with it.
        dtype: ``"float16"``, ``"bfloat16"``, the torch dtype, or None for the default of the device.
        use_fsdp: accepted for compatibility. The loss scaler of a run is correct for sharded gradients in either case.
        kwargs: the arguments of ``OptimWrapper``.
    """

    valid_dtypes = ("float16", "bfloat16")

    def __init__(
        self,
        loss_scale: str | float | dict[str, Any] = "dynamic",
        dtype: str | torch.dtype | None = None,
        use_fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        del use_fsdp
        if not isinstance(loss_scale, float | int | dict) and loss_scale != "dynamic":
            raise ConfigTypeError(f'loss_scale must be a number, a dict or "dynamic", got {loss_scale!r}.')
        known = (None, *self.valid_dtypes, *(getattr(torch, name) for name in self.valid_dtypes))
        require(dtype in known, f"dtype must be one of {self.valid_dtypes}, got {dtype!r}.")
        self._given_scale = loss_scale
        super().__init__(loss_scale=loss_scale, dtype=dtype, **kwargs)

    def _configure(self, device_type: str) -> None:
        dtype, _, nonfinite = self._requested
        scale = self._given_scale
        if scale != "dynamic" and parse_dtype(dtype, device_type) is torch.bfloat16:
            print_log(f"loss_scale={scale!r} has no effect, because bfloat16 needs no loss scaling.", logger="current")
            scale = "dynamic"
        self._requested = dtype, scale, nonfinite
        super()._configure(device_type)

    @property
    def cast_dtype(self) -> torch.dtype | None:
        """The dtype that was requested; None for the default of the device."""
        dtype = self._requested[0]
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with that of the loss scaler under ``loss_scaler`` if there is one."""
        state = OptimWrapper.state_dict(self)
        if self.grad_scaler is not None:
            state["loss_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore a state. The argument is not modified."""
        OptimWrapper.load_state_dict(self, {key: value for key, value in state_dict.items() if key != "loss_scaler"})
        self.load_scaler_state(state_dict)
