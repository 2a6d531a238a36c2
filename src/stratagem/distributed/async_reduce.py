"""Run a MAX all-reduce of one integer in the background."""

from __future__ import annotations

from typing import final

import torch
import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group, served_devices

__all__ = ["AsyncMaxReduce"]


@final
class AsyncMaxReduce:
    """Compute the maximum of one integer over all ranks, asynchronously.

    ``start`` begins the all-reduce and ``wait`` returns its result, typically one iteration later. The reduction runs on
    the CPU, so it never synchronizes with the accelerator.
    """

    def __init__(self) -> None:
        self._number = torch.zeros(1, dtype=torch.int64)
        self._group: Group | None = None
        self._work: torch_dist.Work | None = None
        self._connected = False

    @property
    def pending(self) -> bool:
        """Whether a reduction has been started but its result has not been read."""
        return self._work is not None

    def start(self, number: int) -> None:
        """Start a reduction with this rank's number.

        Collective; all ranks must call ``start`` before any rank calls ``wait``.
        """
        if not self._connected:
            # With a group that serves only accelerators, waiting for the result would synchronize with the device.
            self._group = None if "cpu" in served_devices() else torch_dist.new_group(backend="gloo")
            self._connected = True
        self._number.fill_(number)
        self._work = torch_dist.all_reduce(self._number, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)

    def wait(self) -> int:
        """Wait until all ranks have called ``start``, and return the maximum; return 0 if no reduction is pending."""
        if self._work is None:
            return 0
        work, self._work = self._work, None
        work.wait()
        return int(self._number.item())
