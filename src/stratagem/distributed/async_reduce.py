"""Let ranks decide together without waiting for each other."""

from __future__ import annotations

from typing import final

import torch
import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group, served_devices

__all__ = ["Agreement"]


@final
class Agreement:
    """The greatest of the numbers that the ranks put in: asked at one moment, read at a later one.

    In between the exchange goes on in the background. It costs two short calls on the CPU, and no device is waited for.
    """

    def __init__(self) -> None:
        self._number = torch.zeros(1, dtype=torch.int64)
        self._group: Group | None = None
        self._work: torch_dist.Work | None = None
        self._connected = False

    @property
    def asked(self) -> bool:
        """Whether a question waits for its answer to be read."""
        return self._work is not None

    def ask(self, number: int) -> None:
        """Put in this rank's number. Collective: every rank asks before any reads the answer."""
        if not self._connected:
            # A group that serves accelerators alone would make the answer a wait for the device.
            self._group = None if "cpu" in served_devices() else torch_dist.new_group(backend="gloo")
            self._connected = True
        self._number.fill_(number)
        self._work = torch_dist.all_reduce(self._number, torch_dist.ReduceOp.MAX, group=self._group, async_op=True)

    def answer(self) -> int:
        """Return the greatest number of all ranks; 0 where nothing was asked. Waits for ranks that have not asked yet."""
        if self._work is None:
            return 0
        work, self._work = self._work, None
        work.wait()
        return int(self._number.item())
