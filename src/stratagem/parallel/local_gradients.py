"""Average gradients that ``DistributedDataParallel`` did not average."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stratagem.distributed import all_reduce
from stratagem.utils.torch_private import backward_pass_id, tensors_in

__all__ = ["LocalGradients", "average_gradients"]


@final
class LocalGradients:
    """Detects backward passes whose gradients DDP does not average, and averages those gradients before the update.

    DDP averages gradients only in the first backward pass after each forward pass. Gradients of additional backward passes,
    for example when a step calls ``backward`` for each of two losses, are only accumulated on each rank.

    Args:
        replica: the ``DistributedDataParallel`` whose parameters have the gradients.

    Attributes:
        held: whether gradients were intentionally not averaged (``no_sync``); the next averaging pass includes them.
        missed: whether a backward pass was not averaged although it was not under ``no_sync``.
    """

    def __init__(self, replica: DistributedDataParallel) -> None:
        self.held = False
        self.missed = False
        self._averages = True
        self._is_next_averaged = False
        self._last_pass = -1
        # A weak reference, so that assigning this object to the replica does not register the replica as its own submodule.
        self._replica = weakref.ref(replica)

    @classmethod
    def of(cls, replica: DistributedDataParallel) -> LocalGradients:
        """Return the :class:`LocalGradients` of a replica, and start to observe its forward passes."""
        found = cls(replica)

        def follow(module: nn.Module, _: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                found.follow(output, averaged=cast("DistributedDataParallel", module).require_backward_grad_sync)

        replica.register_forward_hook(follow)
        return found

    def follow(self, output: Any, *, averaged: bool) -> None:
        """Record the backward passes that reach this output of a forward pass; ``averaged`` is False under ``no_sync``."""
        self._averages = averaged
        self._is_next_averaged = self._is_next_averaged or averaged
        can_be_seen = False
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                can_be_seen = True
                tensor.register_hook(self._note_pass)
        # Without such a tensor, the backward pass cannot be observed. Assume that it was missed: averaging gradients twice
        # does not change them.
        self.missed = self.missed or not can_be_seen

    def complete(self) -> None:
        """Average the gradients of all parameters if some have not been averaged. Collective.

        The mean is linear, so averaging the sum of averaged and local gradients yields the mean of the ranks' total gradients.
        A parameter that only some ranks used has a zero gradient on the other ranks; a parameter that no rank used has no
        gradient.
        """
        if not (self.held or self.missed):
            return
        replica = cast("DistributedDataParallel", self._replica())
        ignored = set(replica.parameters_to_ignore)
        # Also of frozen parameters, which have gradients if they were frozen in the middle of an accumulation window.
        some = [
            each
            for name, each in replica.module.named_parameters()
            if (each.is_floating_point() or each.is_complex()) and name not in ignored
        ]
        average_gradients(some, replica.process_group)
        self.held = self.missed = False

    def _note_pass(self, _: Tensor) -> None:
        current = backward_pass_id()
        if current == self._last_pass:
            return
        self._last_pass = current
        if self._is_next_averaged:
            self._is_next_averaged = self.held = False
        elif self._averages:
            self.missed = True
        else:
            self.held = True


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], group: Any) -> None:
    """Average gradients over a group.

    A missing gradient is treated as zero, but remains missing if no rank has a gradient. Collective, with the same
    parameters on every rank.
    """
    some = list(parameters)
    if not some:
        return
    # 0 for no gradient, 1 for a dense gradient and 2 for a sparse gradient.
    kinds = torch.tensor(
        [0 if each.grad is None else 1 + int(each.grad.is_sparse) for each in some], device=some[0].device
    )
    all_reduce(kinds, "max", group)
    dense: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter, kind in zip(some, kinds.tolist(), strict=True):
        if kind == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if kind == 2:
            parameter.grad = parameter.grad.to_dense()
        dense.setdefault((parameter.grad.device, parameter.grad.dtype), []).append(parameter.grad)
    for alike in dense.values():
        flat = torch.cat([each.reshape(-1) for each in alike])
        all_reduce(flat, "mean", group)
        for gradient, values in zip(alike, flat.split([each.numel() for each in alike]), strict=True):
            gradient.copy_(values.view_as(gradient))
