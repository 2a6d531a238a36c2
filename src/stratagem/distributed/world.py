"""What is true of this process in its run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["World", "pick_device"]


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The facts of one process, resolved once and never changed.

    ``launcher``, ``size``, ``timestamp`` and ``seed`` are the same on every rank. ``seed`` is the seed that the ranks
    share, without a rank's offset.
    """

    launcher: str = "none"
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    device: torch.device = _CPU
    timestamp: str = ""
    seed: int = 0

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this process, be it the only one."""
        return self.launcher != "none"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def pick_device(local_rank: int) -> torch.device:
    """Return the device of a local rank: its accelerator, whichever kind torch knows, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, local_rank % torch.accelerator.device_count())
