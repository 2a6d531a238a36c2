"""The rank, device and seed of this process."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from stratagem.errors import LaunchError

__all__ = ["World", "current_device", "describe_device", "device_identity", "pick_device", "select_device"]


_CPU = torch.device("cpu")
# The variables that restrict the devices which a process sees.
_VISIBLE_DEVICES: Final = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
    "ASCEND_RT_VISIBLE_DEVICES",
)


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


def pick_device(local_rank: int, local_size: int = 1) -> torch.device:
    """Return the device of a local rank: an accelerator of any type that torch supports, or the CPU.

    If a rank sees a single accelerator, its launcher may have assigned that device to it, so the rank uses it. Whether other
    ranks use the same device is checked when the ranks connect.

    Args:
        local_rank: the number of the rank on its host.
        local_size: the number of ranks on its host, as far as the launcher states it.

    Raises:
        LaunchError: if the rank sees several accelerators, but fewer than there are ranks on its host.
    """
    if not torch.accelerator.is_available():
        return _CPU
    kind = torch.accelerator.current_accelerator()
    if kind is None:
        return _CPU
    count, ranks = torch.accelerator.device_count(), max(local_size, local_rank + 1)
    if 1 < count < ranks:
        raise LaunchError(
            f"Local rank {local_rank} is one of {ranks} ranks on this host, but torch sees only {count} {kind.type} devices"
            f"{_describe_visible()}, so some ranks would share a device. Start at most {count} ranks on each host, make more "
            "devices visible, or let the launcher assign exactly one device to each rank."
        )
    return torch.device(kind.type, 0 if count == 1 else local_rank)


def select_device(device: torch.device) -> None:
    """Make an accelerator the current device of this process; do nothing for the CPU."""
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)


def current_device() -> torch.device:
    """Return the current accelerator of this process, or the CPU if there is none."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    return _CPU if kind is None else torch.device(kind.type, torch.accelerator.current_device_index())


def device_identity(device: torch.device) -> str:
    """Return the UUID of an accelerator, which differs from those of all other devices; empty if torch does not know it."""
    if device.type == "cpu":
        return ""
    properties = getattr(torch.get_device_module(device), "get_device_properties", None)
    return "" if properties is None else str(getattr(properties(device), "uuid", ""))


def describe_device(device: torch.device) -> str:
    """Return the name of a device of this host, with the environment variables that restrict the visible devices."""
    return f"{device} on {socket.gethostname()}{_describe_visible()}"


def _describe_visible(environ: Mapping[str, str] = os.environ) -> str:
    named = ", ".join(f"{name}={environ[name]}" for name in _VISIBLE_DEVICES if name in environ)
    return f" ({named})" if named else ""
