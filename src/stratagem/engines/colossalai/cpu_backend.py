"""Patches that let ColossalAI 0.5.0 train on the CPU.

The library can train on the CPU, but some of its code assumes an accelerator. The following parts are patched in the
current process:

1. ZeRO uses streams, which the library's CPU accelerator lacks. :class:`HostAccelerator` provides streams without
   effect.
2. ``LowLevelZeroOptimizer`` asserts that the accelerator is CUDA or NPU. Its other check, that all parameters have the same
   dtype, is preserved.
3. The C++ kernel of CPUAdam and HybridAdam can only be built with CUDA. :class:`TorchAdamKernel` implements the same
   update in torch.
4. Communication cannot overlap with computation; see ``overlap_communication`` in :mod:`plugins <.plugins>`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, final

import torch
from colossalai.accelerator import set_accelerator
from colossalai.accelerator.cpu_accelerator import CpuAccelerator
from colossalai.kernel.kernel_loader import CPUAdamLoader
from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer
from torch import Tensor

from stratagem.errors import PlacementError

__all__ = ["train_on_cpu"]


def train_on_cpu() -> None:
    """Patch ColossalAI in this process to train on the CPU. Idempotent."""
    set_accelerator(HostAccelerator())
    LowLevelZeroOptimizer._sanity_checks = _require_single_dtype
    CPUAdamLoader.REGISTRY = [TorchAdamExtension]


@final
class _Stream:
    """A stream without effect, because all work on the CPU is synchronous."""

    def wait_stream(self, stream: Any) -> None:
        """Return immediately."""

    def synchronize(self) -> None:
        """Return immediately."""


@final
class HostAccelerator(CpuAccelerator):
    """ColossalAI's CPU accelerator, extended with streams. All work is synchronous."""

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        """Return immediately."""

    def empty_cache(self) -> None:
        """Do nothing, since the CPU has no cache to empty."""

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> _Stream:  # noqa: N802 -- the name in ColossalAI
        return _Stream()

    def current_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def default_stream(self, device: Any = None) -> _Stream:
        return _Stream()

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(new_state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)


def _require_single_dtype(optimizer: Any) -> None:
    """Replace ``_sanity_checks``: check only the parameters."""
    for group in optimizer.optim.param_groups:
        for parameter in group["params"]:
            if parameter.dtype != optimizer.dtype:
                raise PlacementError(
                    f"ColossalAI's ZeRO requires all parameters to have the same dtype, but this model has {optimizer.dtype} "
                    f"and {parameter.dtype}. Cast them to one dtype, or use mixed_precision='bf16'."
                )


@final
class TorchAdamExtension:
    """Provide :class:`TorchAdamKernel` to ColossalAI's kernel loader."""

    name = "cpu_adam_torch"
    priority = 0

    def is_available(self) -> bool:
        """Return True."""
        return True

    def assert_compatible(self) -> None:
        """Do nothing, since every CPU is supported."""

    def load(self) -> SimpleNamespace:
        """Return an object with the attributes of the C++ extension module."""
        return SimpleNamespace(CPUAdamOptimizer=TorchAdamKernel)


@final
class TorchAdamKernel:
    """Update one tensor with Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101), with the arguments of the C++ kernel."""

    def __init__(
        self, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, adamw_mode: bool
    ) -> None:
        self._decoupled = adamw_mode

    @torch.no_grad()
    def step(
        self,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        parameter: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        loss_scale: float,
    ) -> None:
        """Update the parameter and its moments in place. The gradient is divided by a positive ``loss_scale``."""
        gradient = gradient.to(exp_avg.dtype)
        if loss_scale > 0:
            gradient = gradient / loss_scale
        if self._decoupled:
            parameter.mul_(1 - lr * weight_decay)
        elif weight_decay:
            gradient = gradient + weight_decay * parameter
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        parameter.addcdiv_(exp_avg, (exp_avg_sq / second).sqrt_().add_(eps), value=-lr / first)
