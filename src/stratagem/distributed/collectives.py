"""Collectives on tensors. In a single process, they return immediately and change nothing.

Tensors may be on any device: they are moved to a device that the group's backend supports, and results are moved back.
Ranks are relative to the given group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from stratagem.errors import ConfigTypeError, ConfigValueError, LaunchError
from stratagem.utils.names import did_you_mean

__all__ = [
    "all_gather",
    "all_reduce",
    "barrier",
    "broadcast",
    "gather",
    "get_backend",
    "get_dist_info",
    "get_rank",
    "get_world_size",
    "is_distributed",
    "is_main_process",
    "master_only",
    "sync_random_seed",
]

P = ParamSpec("P")
R = TypeVar("R")
Group = torch_dist.ProcessGroup

_OPS = {
    "sum": torch_dist.ReduceOp.SUM,
    "product": torch_dist.ReduceOp.PRODUCT,
    "min": torch_dist.ReduceOp.MIN,
    "max": torch_dist.ReduceOp.MAX,
    "band": torch_dist.ReduceOp.BAND,
    "bor": torch_dist.ReduceOp.BOR,
    "bxor": torch_dist.ReduceOp.BXOR,
}


def is_distributed() -> bool:
    """Return whether a process group is initialized, even if it has only one process."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def get_world_size(group: Group | None = None) -> int:
    """Return the number of processes in the group; 1 without a group."""
    return torch_dist.get_world_size(group) if is_distributed() else 1


def get_rank(group: Group | None = None) -> int:
    """Return this process's rank in the group; 0 without a group."""
    return torch_dist.get_rank(group) if is_distributed() else 0


def get_dist_info(group: Group | None = None) -> tuple[int, int]:
    """Return the rank and the world size."""
    return get_rank(group), get_world_size(group)


def get_backend(group: Group | None = None) -> str | None:
    """Return the name of the group's backend; None without a group."""
    return str(torch_dist.get_backend(group)) if is_distributed() else None


def is_main_process(group: Group | None = None) -> bool:
    """Return whether this is rank 0."""
    return get_rank(group) == 0


def master_only(function: Callable[P, R]) -> Callable[P, R | None]:
    """Decorate a function to run on rank 0 only; on the other ranks it returns None."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | None:
        return function(*args, **kwargs) if is_main_process() else None

    return wrapper


def barrier(group: Group | None = None) -> None:
    """Wait until every rank has reached this call. Collective."""
    if get_world_size(group) > 1:
        torch_dist.barrier(group)


def broadcast(data: Tensor, src: int = 0, group: Group | None = None) -> None:
    """Overwrite ``data`` on every rank with the values of rank ``src``.

    Collective; the shape and dtype must be the same on all ranks.

    Raises:
        LaunchError: if ``src`` is outside ``[0, world size)``.
    """
    _check_rank(src, group)
    if get_world_size(group) > 1:
        moved = _to_backend(data, group)
        torch_dist.broadcast(moved, group=group, group_src=src)
        _copy_back(moved, data)


def all_reduce(data: Tensor, op: str = "sum", group: Group | None = None) -> None:
    """Reduce ``data`` over all ranks in place.

    Collective. ``op`` is one of sum, mean, product, min, max, band, bor, bxor.

    Raises:
        ConfigValueError: if the operation is unknown.
        ConfigTypeError: if ``op`` is ``"mean"`` and the dtype is an integer type.
    """
    if op != "mean" and op not in _OPS:
        raise ConfigValueError(f"all_reduce: unknown op={op!r}. {did_you_mean(op, [*_OPS, 'mean'])}")
    if op == "mean" and not (data.is_floating_point() or data.is_complex()):
        raise ConfigTypeError(f"all_reduce: the mean of {data.dtype} values is not supported; convert to float first.")
    size = get_world_size(group)
    if size == 1:
        return
    moved = _to_backend(data, group)
    # gloo does not support ReduceOp.AVG.
    torch_dist.all_reduce(moved, _OPS["sum" if op == "mean" else op], group)
    if op == "mean":
        moved.div_(size)
    _copy_back(moved, data)


def start_sum(data: Tensor) -> Callable[[], None]:
    """Start to sum ``data`` over all ranks in place; return a function that waits until ``data`` contains the result.

    Collective. The reduction runs in the background, so that it overlaps with computations such as a backward pass.
    """
    if get_world_size() == 1:
        return _nothing
    moved = _to_backend(data, None)
    work = torch_dist.all_reduce(moved, torch_dist.ReduceOp.SUM, async_op=True)

    def wait() -> None:
        work.wait()
        _copy_back(moved, data)

    return wait


def _nothing() -> None:
    """Do nothing, since there is nothing to wait for."""


def all_gather(data: Tensor, group: Group | None = None) -> list[Tensor]:
    """Return the tensors of all ranks, ordered by rank. Collective; the shape and dtype must be equal on all ranks."""
    size = get_world_size(group)
    if size == 1:
        return [data]
    moved = _to_backend(data, group)
    gathered = [torch.empty_like(moved) for _ in range(size)]
    torch_dist.all_gather(gathered, moved, group)
    return [part.to(data.device) for part in gathered]


def gather(data: Tensor, dst: int = 0, group: Group | None = None) -> list[Tensor]:
    """Return the tensors of all ranks on rank ``dst`` and an empty list on the others.

    Collective; the shape and dtype must be equal on all ranks.

    Raises:
        LaunchError: if ``dst`` is outside ``[0, world size)``.
    """
    _check_rank(dst, group)
    size = get_world_size(group)
    if size == 1:
        return [data]
    moved = _to_backend(data, group)
    here = get_rank(group) == dst
    gathered = [torch.empty_like(moved) for _ in range(size)] if here else None
    torch_dist.gather(moved, gathered, group=group, group_dst=dst)
    return [part.to(data.device) for part in gathered or ()]


def sync_random_seed() -> int:
    """Return a random seed, drawn on rank 0 and the same on every rank. Collective."""
    seed = torch.randint(2**31 - 1, (1,), generator=_fresh_generator())
    broadcast(seed)
    return int(seed.item())


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def _check_rank(rank: int, group: Group | None) -> None:
    size = get_world_size(group)
    if not 0 <= rank < size:
        raise LaunchError(f"Rank {rank} does not exist. The world size is {size}, so valid ranks are 0 to {size - 1}.")


def _to_backend(data: Tensor, group: Group | None) -> Tensor:
    """Return the tensor, contiguous and on a device that the group supports, without a copy if possible."""
    served = served_devices(group)
    # Backends send the raw memory, so lazy conjugation and negation must be resolved first.
    data = data.detach().resolve_conj().resolve_neg()
    if data.device.type in served:
        return data.contiguous()
    if "cpu" in served:
        return data.cpu().contiguous()
    accelerator = torch.accelerator.current_accelerator()
    return data.to(accelerator).contiguous()


def served_devices(group: Group | None = None) -> set[str]:
    """Return the device types that the group's backends support."""
    # For example "cpu:gloo,cuda:nccl".
    return {pair.partition(":")[0] for pair in torch_dist.get_backend_config(group).split(",")}


def _copy_back(moved: Tensor, data: Tensor) -> None:
    if moved.data_ptr() != data.data_ptr() or moved.device != data.device:
        data.detach().copy_(moved)
