"""Run a MAX all-reduce of one integer in the background."""

from __future__ import annotations

from typing import final

import torch
import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group
from stratagem.distributed.cpu_groups import shared_cpu_group

__all__ = ["AsyncMaxReduce"]


@final
class AsyncMaxReduce:
    """Compute the maximum of one or more integers over all ranks, asynchronously.

    ``start`` begins the all-reduce and ``wait`` returns its result, typically one iteration later. The reduction runs on
    the CPU, so it never synchronizes with the accelerator.

    Args:
        size: the number of integers, each of which has its own maximum.
    """

    def __init__(self, size: int = 1) -> None:
        self._numbers = torch.zeros(size, dtype=torch.int64)
        self._group: Group | None = None
        self._work: torch_dist.Work | None = None
        self._connected = False

    @property
    def pending(self) -> bool:
        """Whether a reduction has been started whose result has not been read yet."""
        return self._work is not None

    def start(self, *numbers: int) -> None:
        """Start a reduction with this rank's numbers.

        Collective; ``wait`` returns once all ranks have called ``start``.
        """
        if not self._connected:
            # If the default group supports only accelerators, waiting for a result on a device would synchronize with it.
            self._group = shared_cpu_group()
            self._connected = True
        self._numbers[:] = torch.tensor(numbers, dtype=torch.int64)
        self._work = torch_dist.all_reduce(self._numbers, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)

    def wait(self) -> int:
        """Wait until all ranks have called ``start``; return the maximum of the first number, or 0 if no reduction is pending."""
        numbers = self.wait_all()
        return numbers[0] if numbers else 0

    def wait_all(self) -> tuple[int, ...]:
        """Wait until all ranks have called ``start``; return the maximums, or ``()`` if no reduction is pending."""
        if self._work is None:
            return ()
        work, self._work = self._work, None
        work.wait()
        return tuple(self._numbers.tolist())
