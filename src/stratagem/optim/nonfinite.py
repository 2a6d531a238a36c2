"""See gradients that are not finite before they reach the weights.

A loss that is not finite reaches every gradient of its backward pass, since :func:`marked` begins the pass with
``1 + 0 * loss``. The exchange of gradients then carries it to all ranks, so each of them sees the same and decides the
same without a word of their own. Only gradients that are sharded need one small all-reduce an update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from stratagem.distributed import all_reduce
from stratagem.tensors.dtensor import is_plain, to_local

__all__ = ["DeferredWatch", "UpdateWatch", "Watch", "all_finite", "marked"]


class Watch(Protocol):
    """Looks at the losses and the gradients of each update before it is made."""

    def begin(self, loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the options with which ``loss.backward`` is called."""

    def admits(self, gradients: list[Tensor], norm: Tensor | None) -> bool:
        """Tell whether the update may be made; ``norm`` is that of all gradients where it is known already."""


def marked(loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options of ``loss.backward`` with which a loss that is not finite makes every gradient so.

    Bits of finite losses' gradients are what they would be. A ``gradient`` that is given stays as it is.
    """
    return options if "gradient" in options else {**options, "gradient": loss.detach() * 0 + 1}


@final
class UpdateWatch:
    """Refuses an update by gradients that are not finite, and keeps the names of their parameters.

    To know it, each update waits for the device; on the CPU there is nothing to wait for.

    Args:
        optimizer: whose gradients these are.
        names: of the parameters, by their identity.
        exchanged: whether gradients are exchanged with other ranks, which then learn of a loss by them.

    Attributes:
        unsound: of the last refused update, the parameters whose gradients were not finite, last registered first:
            the nearest to the loss is among the first.
    """

    def __init__(self, optimizer: Optimizer, names: Mapping[int, str], *, exchanged: bool = True) -> None:
        self.unsound: tuple[str, ...] = ()
        self._optimizer = optimizer
        self._names = names
        self._flag = _Flag(optimizer)
        # Where nobody is to be told and nothing waited for, looking at a loss is cheaper than marking it.
        self._looks = not exchanged and self._flag.found.device.type == "cpu"

    def begin(self, loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._looks or loss.numel() != 1:
            return marked(loss, options)
        if not math.isfinite(loss.item()):
            self._flag.found.fill_(1.0)
        return options

    def admits(self, gradients: list[Tensor], norm: Tensor | None) -> bool:
        self._flag.note(gradients, norm)
        if not self._flag.found.item():
            return True
        self._flag.found.zero_()
        self.unsound = tuple(
            self._names.get(id(parameter), "a parameter without a name")
            for group in reversed(self._optimizer.param_groups)
            for parameter in reversed(group["params"])
            if parameter.grad is not None and not all_finite([parameter.grad])
        )
        return False


@final
class DeferredWatch:
    """Admits every update and remembers which gradients were not finite, without waiting for the device.

    Where the optimizer's fused kernels take the flag, they change nothing from the first such update on, so the weights
    stay as they were before it. Others carry the values into the weights until somebody looks.

    Attributes:
        protects: whether the weights stay as they were.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer: Any = optimizer
        self._flag = _Flag(optimizer)
        self._history: list[Tensor] = []
        self.protects = bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
            group.get("fused") for group in optimizer.param_groups
        )
        if self.protects:
            self._give_flag()

    def begin(self, loss: Tensor, options: Mapping[str, Any]) -> Mapping[str, Any]:
        return marked(loss, options)

    def admits(self, gradients: list[Tensor], norm: Tensor | None) -> bool:
        self._flag.note(gradients, norm)
        self._history.append(self._flag.found.clone())
        return True

    def first_unsound(self) -> int | None:
        """Return how many updates since the last look were sound before the first that was not; None if all were.

        Waits for the device.
        """
        flags = torch.stack(self._history).tolist() if self._history else []
        self._history = []
        return flags.index(1.0) if 1.0 in flags else None

    def _give_flag(self) -> None:
        # What torch's GradScaler gives to fused kernels, which read it on the device.
        self._optimizer.found_inf, self._optimizer.grad_scale = self._flag.found, None

    def end(self) -> None:
        """Take the flag from the optimizer."""
        if self.protects:
            del self._optimizer.found_inf, self._optimizer.grad_scale
            self.protects = False


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether every value of this rank's part of the tensors is finite; waits once for each device and type."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(_values, tensors):
        if tensor.is_floating_point() and tensor.numel():
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return all(_are_finite(alike) for alike in by_kind.values())


def _are_finite(alike: list[Tensor]) -> bool:
    """Tell it of tensors of one device and type."""
    if alike[0].dtype.itemsize == 1:
        # Types of eight bits have no arithmetic of their own.
        alike = [tensor.float() for tensor in alike]
    # One pass that reads; a norm may overflow where every value is finite, so a bad one is looked at again.
    if torch.stack(torch._foreach_norm(alike, 2.0)).isfinite().all().item():
        return True
    return all(tensor.isfinite().all().item() for tensor in alike)


@final
class _Flag:
    """A scalar on the optimizer's device that becomes 1 where a gradient is not finite.

    Attributes:
        found: the scalar; it never becomes 0 by itself.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        device = parameters[0].device
        self.found = torch.zeros((), device=device)
        self._one = torch.ones((), device=device)
        # Asked of the parameters once, since asking each gradient at every update is dear; they are of one kind with them.
        kinds = {(is_plain(each), each.dtype.is_complex, each.device, each.dtype) for each in parameters}
        self._alike = len(kinds) == 1 and kinds.pop()[:3] == (True, False, device)

    def note(self, gradients: list[Tensor], norm: Tensor | None) -> None:
        """Set it where a value is not finite, without waiting; collective for sharded gradients.

        ``norm`` is that of all gradients, where it is known.
        """
        if norm is not None:
            self._raise((~norm.isfinite()).to(self.found))
            return
        if self._alike and self._look_at_all(gradients):
            return
        parts = list(map(_values, gradients))
        for device, dtype in {(part.device, part.dtype) for part in parts}:
            flag = torch.zeros((), device=device)
            alike = [part for part in parts if (part.device, part.dtype) == (device, dtype)]
            torch._amp_foreach_non_finite_check_and_unscale_(alike, flag, torch.ones_like(flag))
            self._raise(flag)
        if not all(map(is_plain, gradients)):
            all_reduce(self.found, "max")

    def _look_at_all(self, gradients: list[Tensor]) -> bool:
        """Look at all of them with one kernel; return whether it could."""
        try:
            # Multiplied by 1 they keep their bits.
            torch._amp_foreach_non_finite_check_and_unscale_(gradients, self.found, self._one)
        except RuntimeError:
            # Sparse gradients, which their parameters do not tell of, or a group that came later and lies elsewhere.
            self._alike = False
        return self._alike

    def _raise(self, flag: Tensor) -> None:
        self.found.copy_(torch.maximum(self.found, flag.to(self.found)))


def _values(tensor: Tensor) -> Tensor:
    """Return what of a tensor can be looked at: this rank's part, the stored values of a sparse one, two reals for one."""
    part = to_local(tensor.detach())
    if part.is_sparse:
        part = part._values()
    return torch.view_as_real(part) if part.is_complex() else part
