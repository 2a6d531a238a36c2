"""Run the code of one rank of a large job in a single process: a process group without communication, and fake tensors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from stratagem.distributed import close_dist
from stratagem.errors import StateError

__all__ = ["fake_copies", "fake_unsharded", "fake_world", "new_fake_mode", "replaced", "without_fake_tensors"]

_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Collectives on Python objects read bytes from tensors, which fake tensors do not have.
_OBJECT_COLLECTIVES: Final = ("broadcast_object_list", "all_gather_object", "gather_object")


def new_fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors have no memory. Constants of a model that are real tensors are converted."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fake_world(size: int, ranks_per_node: int) -> Iterator[None]:
    """Make this process rank 0 of ``size`` ranks. Collectives return immediately and leave their tensors unchanged.

    Raises:
        StateError: if this process already has a process group.
    """
    if torch_dist.is_initialized():
        raise StateError(
            "This process already has a process group, and planning needs a simulated one. Plan in a process that no launcher "
            "started."
        )
    own = {
        "RANK": "0",
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(min(size, ranks_per_node)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    before = {name: os.environ.get(name) for name in _VARIABLES}
    with ExitStack() as undo:
        undo.callback(_restore, before)
        os.environ.update(own)
        torch_dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        undo.callback(close_dist)
        for name in _OBJECT_COLLECTIVES:
            undo.enter_context(replaced(torch_dist, name, without_fake_tensors(getattr(torch_dist, name))))
        yield


def _restore(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def without_fake_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that runs with real tensors, because it reads values."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute inside the ``with`` block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def fake_copies(mode: FakeTensorMode, model: nn.Module, device: torch.device) -> None:
    """Replace all parameters and buffers of a model on the meta device with fake tensors on a device; shared ones stay shared."""
    copies: dict[int, Tensor] = {}
    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _fake_copy(tensor, device)
                    tensors[name] = copies[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter


@contextmanager
def fake_unsharded(model: nn.Module, device: torch.device, copies: dict[Tensor, Tensor]) -> Iterator[None]:
    """Omit parameters that are not sharded inside the ``with`` block, and replace them with fake parameters after it.

    Args:
        model: a model on the meta device. A fake tensor mode is active.
        device: the device of the fake parameters.
        copies: receives the fake parameter for each original one.
    """
    found = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.is_meta and not isinstance(parameter, DTensor)
    ]
    for parameters, name, _ in found:
        parameters[name] = None
    yield
    for parameters, name, parameter in found:
        if parameter not in copies:
            copies[parameter] = _fake_copy(parameter, device)
        parameters[name] = copies[parameter]  # type: ignore[assignment]  # a parameter for a parameter


def _fake_copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = torch.empty_strided(tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device)
    if not isinstance(tensor, nn.Parameter):
        return copy
    parameter = nn.Parameter(copy, requires_grad=tensor.requires_grad)
    vars(parameter).update(vars(tensor))
    return parameter
