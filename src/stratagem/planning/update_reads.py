"""Let an update of an optimizer read values of tensors, which fake tensors do not have."""

from __future__ import annotations

from typing import Any, Final, final

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["UpdateReads"]

# Differs from 0 and 1, because optimizers divide by values and by their difference from 1.
_FRACTION: Final = 0.5


@final
class UpdateReads(TorchDispatchMode):
    """Returns a number for each unknown value that is read inside the ``with`` block; sizes of states rarely depend on it.

    Attributes:
        count: the number of unknown values that were read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        if func is not torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args)
        except DataDependentOutputException:
            self.count += 1
            dtype = args[0].dtype
            return True if dtype == torch.bool else _FRACTION if dtype.is_floating_point else 1
