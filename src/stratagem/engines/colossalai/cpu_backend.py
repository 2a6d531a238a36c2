"""What ColossalAI 0.5.0 has to be told to train on a machine without an accelerator.

Its engine works on the CPU, but asks for a device in four places. All are answered from outside, in this process alone:

1. Its class for the CPU has no streams, which ZeRO uses: :class:`HostAccelerator` has streams that do nothing.
2. ``LowLevelZeroOptimizer`` asserts that the accelerator is a CUDA or NPU one; its other check, that parameters have one
   type, is kept.
3. The kernel of CPUAdam and HybridAdam is C++ that builds with CUDA alone: :class:`TorchAdamKernel` does the same in torch.
4. Communication cannot overlap with computing; see ``overlap_communication`` in :mod:`options <.options>`.
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
    """Have ColossalAI train on the CPU in this process. Idempotent."""
    set_accelerator(HostAccelerator())
    LowLevelZeroOptimizer._sanity_checks = _require_one_type
    CPUAdamLoader.REGISTRY = [TorchAdamExtension]


@final
class _Stream:
    """A queue of work on a device that has none: everything was done when the call returned."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


@final
class HostAccelerator(CpuAccelerator):
    """ColossalAI's CPU, with one queue in which everything is done at once."""

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def synchronize(self, device: Any = None) -> None:
        """Return at once."""

    def empty_cache(self) -> None:
        """Return at once: there is no cache."""

    def Stream(self, device: Any = None, priority: int = 0, **kwargs: Any) -> _Stream:  # noqa: N802 -- the library's
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


def _require_one_type(optimizer: Any) -> None:
    """Do what of ``_sanity_checks`` is about parameters."""
    for group in optimizer.optim.param_groups:
        for parameter in group["params"]:
            if parameter.dtype != optimizer.dtype:
                raise PlacementError(
                    f"ColossalAI's ZeRO keeps all parameters in one type, and this model has {optimizer.dtype} and "
                    f"{parameter.dtype}. Give them one type, or mixed_precision='bf16'."
                )


@final
class TorchAdamExtension:
    """Offers :class:`TorchAdamKernel` to ColossalAI's loader of kernels."""

    name = "cpu_adam_torch"
    priority = 0

    def is_available(self) -> bool:
        """Return True: torch is there."""
        return True

    def assert_compatible(self) -> None:
        """Return: every CPU will do."""

    def load(self) -> SimpleNamespace:
        """Return what the extension module in C++ would be."""
        return SimpleNamespace(CPUAdamOptimizer=TorchAdamKernel)


@final
class TorchAdamKernel:
    """An update of one tensor by Adam (arXiv:1412.6980) or AdamW (arXiv:1711.05101); the arguments are the kernel's."""

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
        """Update parameter and moments in place; a positive ``loss_scale`` divides the gradient."""
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
