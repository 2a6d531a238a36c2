"""Automatic mixed precision: run the forward pass in bfloat16 or float16, and keep the dtype of the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.gradient_policy import NO_CONTEXT
from stratagem.optim.gradients import NonFinite
from stratagem.optim.optim_wrapper import AccumulatingOptimWrapper
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict
from stratagem.utils.names import did_you_mean
from stratagem.utils.torch_private import inverse_scale, is_scaled, record_found_inf

__all__ = ["HALF_DTYPES", "AmpOptimWrapper", "autocast_dtype", "parse_dtype"]

# The names of the 16-bit dtypes in configurations.
HALF_DTYPES: Final = {
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
# The norms for which multiplying all values by a power of two multiplies the computed norm by it, without other rounding.
_HOMOGENEOUS_NORMS: Final = frozenset({1.0, 2.0, math.inf})
_FLOATS: Final = frozenset({torch.float32, torch.float64})
_SCALER_OPTIONS: Final = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")


class AmpOptimWrapper(AccumulatingOptimWrapper):
    """Run the forward pass under autocast; with float16, scale the loss so that small gradients do not underflow.

    All devices that autocast supports can be used, including the CPU. bfloat16 has the same range as float32 and does
    not need loss scaling. An update whose gradients overflow is skipped: ``num_steps_attempted`` includes it, but
    ``num_steps_applied`` does not, so schedules and averages do not advance. With float16, each update synchronizes
    with the device to detect overflows.

    Args:
        optimizer: the optimizer that updates the parameters.
        loss_scale: the loss scale for float16: ``"dynamic"``, a constant, or the arguments of ``torch.amp.GradScaler``.
        dtype: ``"bfloat16"``, ``"float16"``, the torch dtype, or ``None`` for the default of the device's autocast.
        accumulative_counts: the number of micro-batches per update.
        clip_grad: as in ``AccumulatingOptimWrapper``.
        nonfinite: as in ``AccumulatingOptimWrapper``; float16 always skips.
        prepared: as in ``AccumulatingOptimWrapper``.

    Attributes:
        device_type: the device type of autocast.
        dtype: the dtype of autocast.

    Raises:
        ConfigTypeError: if ``loss_scale`` has a different type.
        ConfigValueError: if autocast does not support ``dtype``, or an argument does not apply to this dtype.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        loss_scale: str | float | Mapping[str, Any] = "dynamic",
        dtype: str | torch.dtype | None = None,
        accumulative_counts: int = 1,
        clip_grad: Mapping[str, Any] | None = None,
        nonfinite: NonFinite | None = None,
        prepared: bool = True,
    ) -> None:
        super().__init__(
            optimizer,
            accumulative_counts=accumulative_counts,
            clip_grad=clip_grad,
            nonfinite=nonfinite,
            prepared=prepared,
        )
        self._requested = dtype, loss_scale, self.nonfinite
        # Whether dividing by the loss scale, which is a power of two, does not round.
        self._scales_exactly = False
        self._configure(_device_type(optimizer))

    def use_device(self, device: torch.device) -> None:
        if device.type != self.device_type:
            self._configure(device.type)

    def _configure(self, device_type: str) -> None:
        """Set the dtype of autocast on a type of device, and the loss scaler.

        The default dtype depends on the device, and the scaler belongs to the device of the loss.
        """
        dtype, loss_scale, self.nonfinite = self._requested
        self.device_type = device_type
        self.dtype = parse_dtype(dtype, device_type)
        self.grad_scaler, self.fixed_scale = None, None
        self.inspects_grads = self.clipping is not None or self.nonfinite is not None
        self.needs_grad_norm = self.nonfinite is not None or (self.clipping is not None and self.clipping.by_norm)
        if self.dtype == torch.float16:
            if self.nonfinite == "error":
                raise ConfigValueError(
                    'nonfinite="error" would stop at the first overflow, but overflows are normal in float16 while the '
                    'loss scale is adjusted. Omit nonfinite, or use dtype="bfloat16".'
                )
            self.fixed_scale, options = _parse_loss_scale(loss_scale)
            self.grad_scaler = GradScaler(device_type, **options)
            # The scaler lowers its scale after an update with non-finite gradients, which must not be applied.
            self.nonfinite = "skip"
            self.inspects_grads = self.needs_grad_norm = True
            self._scales_exactly = _has_powers_of_two(self.grad_scaler.state_dict(), self.fixed_scale)
        elif loss_scale != "dynamic":
            raise ConfigValueError(
                f"loss_scale={loss_scale!r} only applies to float16, but dtype is {self.dtype}. Omit it."
            )

    @property
    def loss_scaler(self) -> GradScaler | None:
        """The loss scaler for float16; None for bfloat16."""
        return self.grad_scaler

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        autocast = torch.autocast(self.device_type, dtype=self.dtype)
        outer = super().optim_context(model)
        return autocast if outer is NO_CONTEXT else _Nested(outer, autocast)

    @property
    def loss_scale(self) -> float | None:
        return None if self.grad_scaler is None else self.grad_scaler.get_scale()

    def unscale(self) -> Tensor | None:
        """Return the factor that divides the gradients by the loss scale if this is exact; otherwise, divide them.

        If all scales are powers of two, ``norm(gradients) * factor`` has the same bits as ``norm(gradients * factor)``, and
        unscaling and clipping can share one pass over the gradients.
        """
        scaler = self.grad_scaler
        if scaler is None or not self._scales_exactly or not is_scaled(scaler, self.optimizer):
            return super().unscale()
        if self.norm_type not in _HOMOGENEOUS_NORMS or not _are_dense_floats(self.optimizer):
            return super().unscale()
        return inverse_scale(scaler)

    def compute_grad_norm(self, grads: list[Tensor], factor: Tensor | None = None) -> Tensor:
        norm = super().compute_grad_norm(grads, factor)
        if factor is not None and self.grad_scaler is not None:
            record_found_inf(self.grad_scaler, self.optimizer, (~norm.isfinite()).float())
        return norm

    def state_dict(self) -> dict[str, Any]:
        scaler = {} if self.grad_scaler is None else {"loss_scaler": self.grad_scaler.state_dict()}
        return {**super().state_dict(), **scaler}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.load_scaler_state(state_dict)

    def load_scaler_state(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the loss scaler from the state of a wrapper, if both have one."""
        # A state without a scaler was saved in a different precision. Keep the configured loss scale.
        if self.grad_scaler is not None and "loss_scaler" in state_dict:
            self.grad_scaler.load_state_dict(dict(state_dict["loss_scaler"]))
            self._scales_exactly = _has_powers_of_two(state_dict["loss_scaler"], self.fixed_scale)


def autocast_dtype(optim: BaseOptimWrapper | OptimWrapperDict) -> torch.dtype | None:
    """Return the dtype of autocast in training; None if an optimizer trains without it, or if several use different dtypes."""
    dtypes = {each.dtype if isinstance(each, AmpOptimWrapper) else None for each in optim.each().values()}
    return dtypes.pop() if len(dtypes) == 1 else None


@final
class _Nested:
    """Two nested context managers, implemented as a class because ``ExitStack`` makes more calls per step."""

    def __init__(self, outer: AbstractContextManager[object], inner: AbstractContextManager[object]) -> None:
        self._outer = outer
        self._inner = inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._inner.__exit__(kind, error, trace)
        finally:
            self._outer.__exit__(kind, error, trace)


def _device_type(optimizer: Optimizer) -> str:
    device: str = optimizer.param_groups[0]["params"][0].device.type
    if device != "meta":
        return device
    # Parameters on the meta device will be moved to the accelerator of this machine, if there is one.
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def _has_powers_of_two(scaler_state: Mapping[str, Any], fixed_scale: float | None) -> bool:
    """Return whether the loss scale, and every value that it may change to, is a power of two."""
    values = [scaler_state.get(name) for name in ("scale", "growth_factor", "backoff_factor")]
    values.append(1.0 if fixed_scale is None else fixed_scale)
    return all(isinstance(value, int | float) and value > 0 and math.frexp(value)[0] == 0.5 for value in values)


def _are_dense_floats(optimizer: Optimizer) -> bool:
    """Return whether all gradients of an optimizer are dense and have at least float32, and there is one."""
    found = False
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is not None:
                if grad.dtype not in _FLOATS or grad.layout is not torch.strided:
                    return False
                found = True
    return found


def parse_dtype(dtype: str | torch.dtype | None, device_type: str) -> torch.dtype:
    """Return the dtype of autocast on a type of device.

    Raises:
        ConfigValueError: if autocast does not support it.
    """
    if dtype is None:
        dtype = torch.get_autocast_dtype(device_type)
    parsed = HALF_DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in HALF_DTYPES.values():
        raise ConfigValueError(f'dtype={dtype!r} is not supported by autocast. Use "bfloat16" or "float16".')
    return parsed


def _parse_loss_scale(loss_scale: str | float | Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Return the constant scale (None if it is dynamic) and the arguments of the scaler."""
    if loss_scale == "dynamic":
        return None, {}
    if isinstance(loss_scale, int | float) and not isinstance(loss_scale, bool):
        return float(loss_scale), {"init_scale": float(loss_scale)}
    if not isinstance(loss_scale, Mapping):
        raise ConfigTypeError(f'loss_scale must be "dynamic", a number, or a mapping, got {loss_scale!r}.')
    for key in loss_scale:
        if key not in _SCALER_OPTIONS:
            raise ConfigKeyError(f"loss_scale has no argument {key!r}. {did_you_mean(key, _SCALER_OPTIONS)}")
    return None, dict(loss_scale)
