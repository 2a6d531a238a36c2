"""The rank, device and seed of this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["World", "pick_device"]


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The distributed environment of one process, resolved once at startup.

    ``launcher``, ``size``, ``timestamp`` and ``seed`` are the same on every rank; ``seed`` has no per-rank offset.
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
        """Whether a launcher started this process, even as the only rank."""
        return self.launcher != "none"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0


def pick_device(local_rank: int) -> torch.device:
    """Return the device of a local rank: an accelerator of any type that torch supports, or the CPU."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind.type, local_rank % torch.accelerator.device_count())
