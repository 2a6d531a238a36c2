"""Detect NaN and Inf in gradients before they reach the weights.

:func:`propagate_nonfinite` starts the backward pass with ``1 + 0 * loss``, so a loss that is NaN or Inf makes all
gradients NaN. Gradient synchronization propagates the NaN to all ranks, so all ranks make the same decision without
additional communication. Only sharded gradients need one small all-reduce per update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from stratagem.distributed import all_reduce
from stratagem.tensors.dtensor import is_plain, is_sharded, stored_shard, to_local
from stratagem.utils.torch_private import fused_step_reads_found_inf, mark_nonfinite, stored_values

__all__ = ["DeferredNonFiniteCheck", "NonFiniteGuard", "SyncNonFiniteCheck", "all_finite", "propagate_nonfinite"]


class NonFiniteGuard(Protocol):
    """Checks the losses and gradients of each update before it is applied.

    Attributes:
        waits: whether ``allows_step`` waits for the result of the check, and therefore only allows updates with a finite norm.
    """

    waits: bool

    def begin(self, loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the arguments for ``loss.backward``."""

    def allows_step(self, gradients: list[Tensor], norm: Tensor | None) -> bool:
        """Return whether the update may be applied; ``norm`` is the norm of all gradients, if it has already been computed."""


def propagate_nonfinite(loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return arguments for ``loss.backward`` that make all gradients NaN if the loss is NaN or Inf.

    The gradients of finite losses are bitwise unchanged. If ``options`` contains ``gradient``, it is returned
    unchanged.
    """
    return options if "gradient" in options else {**options, "gradient": loss.detach() * 0 + 1}


@final
class SyncNonFiniteCheck:
    """Prevents updates with gradients that are NaN or Inf, and records the names of the affected parameters.

    Each update synchronizes with the device, which is free on the CPU.

    Args:
        optimizer: the optimizer whose gradients are checked.
        names: maps the ``id`` of each parameter to its name.
        synchronized: whether gradients are synchronized across ranks, so that a bad loss is propagated to the other
            ranks.

    Attributes:
        nonfinite_params: the parameters whose gradients were NaN or Inf in the last prevented update, in reverse order
            of registration, so that those closest to the loss come first.
    """

    waits = True

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], *, synchronized: bool = True) -> None:
        self.nonfinite_params: tuple[str, ...] = ()
        self._optimizer = optimizer
        self._names = names
        self._flag = _Flag(optimizer)
        # In a single process on the CPU, checking the loss is cheaper than propagating NaN through the gradients.
        self._reads_loss = not synchronized and self._flag.found.device.type == "cpu"

    def begin(self, loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._reads_loss or loss.numel() != 1:
            return propagate_nonfinite(loss, options)
        if not math.isfinite(loss.item()):
            self._flag.found.fill_(1.0)
        return options

    def allows_step(self, gradients: list[Tensor], norm: Tensor | None) -> bool:
        if norm is None:
            self._flag.check(gradients, None)
            finite = not self._flag.found.item()
        else:
            # If the loss was not finite, either the flag is set or the norm is not finite.
            finite = math.isfinite(norm.item()) and not (self._reads_loss and self._flag.found.item())
        if finite:
            return True
        self._flag.found.zero_()
        self.nonfinite_params = tuple(
            self._names.get(id(parameter), "unnamed parameter")
            for group in reversed(self._optimizer.param_groups)
            for parameter in reversed(group["params"])
            if parameter.grad is not None and not all_finite([parameter.grad])
        )
        return False


@final
class DeferredNonFiniteCheck:
    """Allows every update and records which gradients were NaN or Inf, without synchronizing with the device.

    If the optimizer's fused kernels accept ``found_inf``, the kernels skip all updates from the first bad one on, so
    the weights keep their last good values. Otherwise NaN and Inf may reach the weights before :meth:`first_nonfinite`
    is called.

    Args:
        optimizer: the optimizer whose gradients are checked.

    Attributes:
        protects: whether the weights keep their last good values.
    """

    waits = False

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer: Any = optimizer
        self._flag = _Flag(optimizer)
        self._history: list[Tensor] = []
        self.protects = fused_step_reads_found_inf(optimizer) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        if self.protects:
            self._give_flag()

    def begin(self, loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return propagate_nonfinite(loss, options)

    def allows_step(self, gradients: list[Tensor], norm: Tensor | None) -> bool:
        self._flag.check(gradients, norm)
        self._history.append(self._flag.found.clone())
        return True

    def first_nonfinite(self) -> int | None:
        """Return the number of good updates before the first bad one since the last call; None if all were good.

        Synchronizes with the device.
        """
        flags = torch.stack(self._history).tolist() if self._history else []
        self._history = []
        return flags.index(1.0) if 1.0 in flags else None

    def _give_flag(self) -> None:
        # Set the same attributes as torch's GradScaler; the fused kernels read them on the device.
        self._optimizer.found_inf, self._optimizer.grad_scale = self._flag.found, None

    def end(self) -> None:
        """Remove the flag from the optimizer."""
        if self.protects:
            del self._optimizer.found_inf, self._optimizer.grad_scale
            self.protects = False


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values on this rank are finite; synchronizes once per device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(_values, tensors):
        if tensor.is_floating_point() and tensor.numel():
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return all(_are_finite(alike) for alike in by_kind.values())


def _are_finite(alike: list[Tensor]) -> bool:
    """Return whether all values are finite in tensors that share a device and dtype."""
    if alike[0].dtype.itemsize == 1:
        # torch does not implement arithmetic for 8-bit floating-point types.
        alike = [tensor.float() for tensor in alike]
    # The norm takes a single pass but may overflow although all values are finite. If it is not finite, check each
    # value.
    if torch.stack(torch._foreach_norm(alike, 2.0)).isfinite().all().item():
        return True
    return all(tensor.isfinite().all().item() for tensor in alike)


@final
class _Flag:
    """A scalar on the optimizer's device that becomes 1 if a gradient is NaN or Inf.

    Attributes:
        found: the scalar; only the object that created this flag resets it to 0.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        device = parameters[0].device
        # The kernel requires float32, regardless of the default dtype.
        self.found = torch.zeros((), dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.float32, device=device)
        # Inspect the parameters once, because inspecting the gradients in each update would be slow. Each gradient is
        # assumed to have the device, dtype and layout of its parameter.
        kinds = {
            (is_plain(each) or is_sharded(each), each.dtype.is_complex, each.device, each.dtype) for each in parameters
        }
        self._alike = len(kinds) == 1 and kinds.pop()[:3] == (True, False, device)
        self._sharded = not all(map(is_plain, parameters))
        # On the CPU, the norms take longer than the kernel that writes.
        self._only_reads = device.type != "cpu"

    def check(self, gradients: list[Tensor], norm: Tensor | None) -> None:
        """Set the flag if a value is NaN or Inf, without synchronizing. Collective for sharded gradients.

        ``norm`` is the norm of all gradients, if it is known.
        """
        if norm is not None:
            self._set((~norm.isfinite()).to(self.found))
            return
        if not self._alike or not self._check_in_one_pass(gradients):
            parts = list(map(_values, gradients))
            for device, dtype in {(part.device, part.dtype) for part in parts}:
                flag = torch.zeros((), dtype=torch.float32, device=device)
                alike = [part for part in parts if (part.device, part.dtype) == (device, dtype)]
                mark_nonfinite(alike, flag, torch.ones_like(flag))
                self._set(flag)
        if self._sharded or not (self._alike or all(map(is_plain, gradients))):
            all_reduce(self.found, "max")

    def _check_in_one_pass(self, gradients: list[Tensor]) -> bool:
        """Check all gradients with one kernel; return whether that was possible."""
        parts = list(map(stored_shard, gradients)) if self._sharded else gradients
        try:
            if self._only_reads:
                self._set(_any_nonfinite(parts))
            else:
                # Multiplying by 1 does not change any bits.
                mark_nonfinite(parts, self.found, self._one)
        except RuntimeError:
            # Either the gradients are sparse, which the parameters do not show, or a group on another device was added
            # later.
            self._alike = False
        return self._alike

    def _set(self, flag: Tensor) -> None:
        self.found.copy_(torch.maximum(self.found, flag.to(self.found)))


def _any_nonfinite(tensors: list[Tensor]) -> Tensor:
    """Return whether a value of tensors with the same device and dtype is NaN or Inf, as a scalar on the device.

    This reads all values once and writes none. The maximum, unlike other norms, cannot overflow.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]  # an empty tensor, such as a shard, has no maximum
    if not filled:
        return torch.zeros((), dtype=torch.bool)
    return ~torch.stack(torch._foreach_norm(filled, math.inf)).isfinite().all()


def _values(tensor: Tensor) -> Tensor:
    """Return the real values of a tensor on this rank: its local shard, stored values if sparse, both parts if complex."""
    part = to_local(tensor).detach()  # detaching a DTensor would take ten times as long
    if part.is_sparse:
        part = stored_values(part)
    return torch.view_as_real(part) if part.is_complex() else part
