"""Let an update of an optimizer read values of tensors, which fake tensors do not have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, final

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["UpdateReads"]

# Differs from 0 and 1, because optimizers divide by values and by their difference from 1.
_FRACTION: Final = 0.5


@final
class UpdateReads(TorchDispatchMode):
    """Returns a number for each unknown value that is read inside the ``with`` block; sizes of states rarely depend on it.

    Attributes:
        count: the number of unknown values that the updates of optimizers read; not those that a loss scaler reads.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.count = 0
        self._updates = 0

    @contextmanager
    def counting(self, optimizer: Optimizer) -> Iterator[None]:
        """Count the values that the update of an optimizer reads inside the ``with`` block."""
        original, attribute = optimizer.step, vars(optimizer).get("step")

        @wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._updates += 1
            try:
                return original(*args, **kwargs)
            finally:
                self._updates -= 1

        optimizer.step = step  # type: ignore[method-assign]
        try:
            yield
        finally:
            if attribute is None:
                del optimizer.step
            else:
                optimizer.step = attribute  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args)
        except DataDependentOutputException:
            self.count += self._updates > 0
            dtype = args[0].dtype
            return True if dtype == torch.bool else _FRACTION if dtype.is_floating_point else 1
