"""All private names of torch that this package uses, each with the reason; a new torch may change any of them.

``tests/utils/test_torch_private.py`` has one test for each, so that a change in torch fails there with a clear message and
not somewhere in a training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import distributed as _ddp
from torch.optim import Optimizer

__all__ = ["backward_pass_id", "fused_step_reads_found_inf", "mark_nonfinite", "replace_call", "tensors_in"]


def replace_call(module: nn.Module, call: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Replace what ``module(...)`` calls, None for the usual call; return what it called before.

    Private: ``Module._compiled_call_impl``, which ``Module.compile`` sets. It is the only place where a call can be
    redirected before the forward hooks of the module.
    """
    before: Callable[..., Any] | None = module._compiled_call_impl
    module._compiled_call_impl = call
    return before


def tensors_in(output: Any) -> Iterable[Tensor]:
    """Return the tensors in the output of a forward pass, as ``DistributedDataParallel`` finds them.

    Private: ``torch.nn.parallel.distributed._find_tensors``. Only the tensors that DDP finds are part of its reduction.
    """
    return _ddp._find_tensors(output)  # type: ignore[no-any-return]  # untyped in torch


def backward_pass_id() -> int:
    """Return the number of the backward pass that calls this from a hook, -1 outside of one.

    Private: ``torch._C._current_graph_task_id``. No public function distinguishes two backward passes.
    """
    return torch._C._current_graph_task_id()


def fused_step_reads_found_inf(optimizer: Optimizer) -> bool:
    """Return whether the fused kernels of an optimizer read ``found_inf`` on the device and skip the update if it is set.

    Private: ``Optimizer._step_supports_amp_scaling``, which torch's ``GradScaler`` reads for the same purpose.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def mark_nonfinite(tensors: list[Tensor], found: Tensor, scale: Tensor) -> None:
    """Set ``found`` to 1 if a value is NaN or Inf, and multiply the tensors by ``scale``, in one pass on the device.

    Private: ``torch._amp_foreach_non_finite_check_and_unscale_``, the kernel of torch's ``GradScaler``. All tensors must
    have the device and dtype of the first.
    """
    torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, scale)
