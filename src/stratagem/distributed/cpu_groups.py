"""Create additional process groups for CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as torch_dist

from stratagem.distributed.collectives import Group, served_devices
from stratagem.distributed.shared_groups import shared_groups
from stratagem.utils.torch_private import default_store

__all__ = ["destroy_group", "new_cpu_group", "shared_cpu_group"]


def new_cpu_group(ranks: Sequence[int] | None = None) -> Group:
    """Create a gloo group with the timeout of the default group; torch's default would be 30 minutes. Collective.

    Args:
        ranks: the ranks in the group; all by default.
    """
    group: Group = torch_dist.new_group(ranks, timeout=default_store().timeout, backend="gloo")
    return group


def shared_cpu_group() -> Group | None:
    """Return a group of all ranks for CPU tensors: None, the default group, if it supports them. The first call is collective.

    Otherwise, all callers share one group, which exists as long as the default group.
    """
    if "cpu" in served_devices():
        return None
    return shared_groups("cpu", new_cpu_group)


def destroy_group(group: Group) -> None:
    """Destroy a group that is no longer used, if the default group still exists. Not collective."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group(group)
