"""Train with automatic mixed precision: the forward in a smaller type, the parameters in their own."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.optim.base import NOTHING
from stratagem.optim.gradients import NonFinite
from stratagem.optim.optim_wrapper import AccumulatingOptimWrapper
from stratagem.utils.names import did_you_mean

__all__ = ["AmpOptimWrapper"]

_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
_SCALER_OPTIONS: Final = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")


@final
class AmpOptimWrapper(AccumulatingOptimWrapper):
    """Run forwards under autocast; with float16, scale the loss so that small gradients do not vanish.

    It works on every device that autocast knows, also the CPU. bfloat16 has the range of float32 and needs no scale.
    An update whose gradients overflowed is skipped and counts in ``attempts``, not in ``updates``, so schedules and
    averages do not advance; to know it, each float16 update waits for the device.

    Args:
        optimizer: what updates the parameters.
        loss_scale: for float16: ``"dynamic"``, a number that stays as it is, or the arguments of
            ``torch.amp.GradScaler``.
        dtype: ``"bfloat16"``, ``"float16"``, the torch type, or ``None`` for what the device's autocast prefers.
        accumulative_counts: micro-batches per update.
        clip_grad: as in ``AccumulatingOptimWrapper``.
        nonfinite: as in ``AccumulatingOptimWrapper``; float16 skips by itself.

    Raises:
        ConfigTypeError: if ``loss_scale`` is something else.
        ConfigValueError: if autocast does not know ``dtype``, or another argument does not go with it.
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
    ) -> None:
        super().__init__(optimizer, accumulative_counts=accumulative_counts, clip_grad=clip_grad, nonfinite=nonfinite)
        self.device_type = _device_type(optimizer)
        self.dtype = _parse_dtype(dtype, self.device_type)
        self.loss_scaler: GradScaler | None = None
        self._fixed_scale: float | None = None
        if self.dtype == torch.float16:
            self._fixed_scale, options = _parse_loss_scale(loss_scale)
            self.loss_scaler = GradScaler(self.device_type, **options)
            self._skip_overflows()
        elif loss_scale != "dynamic":
            raise ConfigValueError(f"loss_scale={loss_scale!r} is for float16; {self.dtype} needs none. Leave it out.")

    def optim_context(self, model: nn.Module) -> AbstractContextManager[object]:
        autocast = torch.autocast(self.device_type, dtype=self.dtype)
        outer = super().optim_context(model)
        return autocast if outer is NOTHING else _Nested(outer, autocast)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        if self.loss_scaler is not None:
            loss = self.loss_scaler.scale(loss)
        loss.backward(**(kwargs if self.watch is None else self.watch.begin(loss, kwargs)))
        self.inner_count += 1

    def step(self, **kwargs: Any) -> None:
        if self.complete_gradients is not None:
            self.complete_gradients()
        micro_batches = self.inner_count - self._window_start
        self._window_start = self.inner_count
        self.attempts += 1
        if self.loss_scaler is not None:
            self.loss_scaler.unscale_(self.optimizer)
        if self._ready(micro_batches):
            self.optimizer.step(**kwargs)
            self.updates += 1
        if self.loss_scaler is not None:
            self.loss_scaler.update(self._fixed_scale)

    @property
    def loss_scale(self) -> float | None:
        return None if self.loss_scaler is None else self.loss_scaler.get_scale()

    def state_dict(self) -> dict[str, Any]:
        scaler = {} if self.loss_scaler is None else {"loss_scaler": self.loss_scaler.state_dict()}
        return {**super().state_dict(), **scaler}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # A state without one comes from another precision: the scale starts as configured.
        if self.loss_scaler is not None and "loss_scaler" in state_dict:
            self.loss_scaler.load_state_dict(dict(state_dict["loss_scaler"]))

    def _skip_overflows(self) -> None:
        """Let updates pass only where the unscaled gradients are finite: the scaler lowers its scale after others."""
        if self._nonfinite == "error":
            raise ConfigValueError(
                'nonfinite="error" would stop at the first overflow, which float16 meets while it looks for its scale. '
                'Leave it out, or use dtype="bfloat16".'
            )
        self._nonfinite = "skip"
        self._plain = False


@final
class _Nested:
    """Two contexts, the second inside the first."""

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
    # Parameters without memory yet will lie on the machine's accelerator where there is one.
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None else accelerator.type


def _parse_dtype(dtype: str | torch.dtype | None, device_type: str) -> torch.dtype:
    if dtype is None:
        dtype = torch.get_autocast_dtype(device_type)
    parsed = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if parsed is None or parsed not in _DTYPES.values():
        raise ConfigValueError(f'dtype={dtype!r} is no type of autocast. Use "bfloat16" or "float16".')
    return parsed


def _parse_loss_scale(loss_scale: str | float | Mapping[str, Any]) -> tuple[float | None, dict[str, Any]]:
    """Return the scale where it is fixed, and the arguments of the scaler."""
    if loss_scale == "dynamic":
        return None, {}
    if isinstance(loss_scale, int | float) and not isinstance(loss_scale, bool):
        return float(loss_scale), {"init_scale": float(loss_scale)}
    if not isinstance(loss_scale, Mapping):
        raise ConfigTypeError(f'loss_scale must be "dynamic", a number, or a mapping, got {loss_scale!r}.')
    for key in loss_scale:
        if key not in _SCALER_OPTIONS:
            raise ConfigKeyError(f"loss_scale: {key!r} is not known. {did_you_mean(key, _SCALER_OPTIONS)}")
    return None, dict(loss_scale)
