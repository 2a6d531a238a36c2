"""Move batches to the model's device, and to pinned memory."""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Collection, Mapping, MutableMapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stratagem.errors import ConfigTypeError

__all__ = ["BaseDataPreprocessor", "pin_tensors", "to_device"]

_CPU = torch.device("cpu")
_WITHOUT_TENSORS = (str, bytes, bytearray, memoryview, range, int, float, complex, np.ndarray, np.generic)
_BUILT_IN = frozenset({dict, list, tuple})


def to_device(data: Any, device: torch.device, *, non_blocking: bool | None = False) -> Any:
    """Move all tensors in ``data`` to ``device``, without changing ``data``.

    Containers are mappings, sequences, sets and dataclasses, at any depth. A container with nothing to move is returned as
    is; otherwise, a new container of the same type, with the same other attributes, is returned. Objects with a ``to``
    method, such as packed sequences, are moved by calling it. Anything else is returned unchanged.

    Args:
        data: a tensor, a container or an object.
        device: the target device.
        non_blocking: whether copies may run asynchronously. None selects asynchronous copies of tensors in pinned memory,
            which is always safe. Objects receive the argument if their ``to`` accepts it.

    Raises:
        ConfigTypeError: if the class of a container cannot be created with the moved values.
    """

    def move(value: Any) -> Any:
        return to_device(value, device, non_blocking=non_blocking)

    if isinstance(data, Tensor):
        if data.device == device:
            return data
        return data.to(device, non_blocking=_is_pinned(data) if non_blocking is None else non_blocking)
    if data is None or isinstance(data, _WITHOUT_TENSORS):
        return data
    if type(data) not in _BUILT_IN and callable(getattr(data, "to", None)):
        return _move_by_method(data, device, non_blocking)
    return _map_parts(data, move)


def pin_tensors(data: Any) -> Any:
    """Copy all CPU tensors in ``data`` that are in pageable memory to pinned memory, without changing ``data``.

    Containers are handled as in :func:`to_device`, including dataclasses and sets, which torch's ``DataLoader`` does not pin.
    Objects with a ``to`` method are pinned by their method ``pin_memory``, if they have one.

    Raises:
        ConfigTypeError: if the class of a container cannot be created with the pinned values.
    """
    if isinstance(data, Tensor):
        return data if data.device != _CPU or _is_pinned(data) else data.pin_memory()
    if data is None or isinstance(data, _WITHOUT_TENSORS):
        return data
    if type(data) not in _BUILT_IN and callable(getattr(data, "to", None)):
        is_pinned, pin_memory = getattr(data, "is_pinned", None), getattr(data, "pin_memory", None)
        # Torch's DataLoader has already called pin_memory(); without is_pinned(), do not copy the object again.
        return pin_memory() if callable(is_pinned) and callable(pin_memory) and not is_pinned() else data
    return _map_parts(data, pin_tensors)


def _is_pinned(tensor: Tensor) -> bool:
    try:
        return tensor.device.type == "cpu" and tensor.is_pinned()
    except (NotImplementedError, RuntimeError):  # some layouts and subclasses
        return False


def _map_parts(data: Any, move: Callable[[Any], Any]) -> Any:
    """Return a container with ``move`` applied to its values; anything else is returned unchanged."""
    if isinstance(data, Mapping):
        return _with_items(data, move)
    if isinstance(data, Sequence | AbstractSet | deque):
        return _with_elements(data, move)
    if is_dataclass(data) and not isinstance(data, type):
        names = [field.name for field in fields(data) if hasattr(data, field.name)]
        return _with_fields(data, {name: move(getattr(data, name)) for name in names})
    return data


def _move_by_method(data: Any, device: torch.device, non_blocking: bool | None) -> Any:
    """Return ``data.to(device)``. Not every ``to`` accepts ``non_blocking``, and some move in place and return None."""
    kind: Any = type(data)
    asynchronous = _may_be_pinned(data, device) if non_blocking is None else non_blocking
    options = {"non_blocking": True} if asynchronous and _accepts_non_blocking(kind) else {}
    moved = data.to(device, **options)
    return data if moved is None else moved


def _may_be_pinned(data: Any, device: torch.device) -> bool:
    """Return whether an object may be in pinned memory; for CUDA, asynchronous copies from other memory are safe as well."""
    is_pinned = getattr(data, "is_pinned", None)
    return bool(is_pinned()) if callable(is_pinned) else device.type == "cuda"


@functools.cache
def _accepts_non_blocking(kind: type) -> bool:
    try:
        parameters = inspect.signature(kind.to).parameters  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return False
    return "non_blocking" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def _with_items(data: Mapping[Any, Any], move: Callable[[Any], Any]) -> Any:
    items = dict(data.items())
    moved = {key: move(value) for key, value in items.items()}
    if all(moved[key] is value for key, value in items.items()):
        return data
    if type(data) is dict:
        return moved
    if isinstance(data, MutableMapping):
        copied = _copied(data)
        for key, value in moved.items():
            copied[key] = value
        return copied
    return moved if isinstance(data, MappingProxyType) else _created(data, moved)


def _with_elements(data: Collection[Any], move: Callable[[Any], Any]) -> Any:
    elements = list(data)
    moved = [move(element) for element in elements]
    if all(one is other for one, other in zip(elements, moved, strict=True)):
        return data
    if type(data) is list:
        return moved
    if isinstance(data, tuple) and hasattr(data, "_make"):
        return data._make(moved)
    if isinstance(data, MutableSequence):
        copied = _copied(data)
        for index, value in enumerate(moved):
            copied[index] = value
        return copied
    return _created(data, moved)


def _copied(data: Any) -> Any:
    """Return a modifiable copy, because the constructor may need more arguments, such as the factory of a defaultdict."""
    copied = copy.copy(data)
    for name, value in getattr(copied, "__dict__", {}).items():
        if type(value) in (dict, list):
            copied.__dict__[name] = copy.copy(value)
    return copied


def _with_fields(data: Any, values: dict[str, Any]) -> Any:
    if all(getattr(data, name) is value for name, value in values.items()):
        return data
    # Do not call the constructor, which may compute fields or not accept them as arguments.
    copied = copy.copy(data)
    for name, value in values.items():
        object.__setattr__(copied, name, value)
    return copied


def _created(data: Any, values: Any) -> Any:
    try:
        return type(data)(values)
    except Exception as error:
        kind = f"{type(data).__module__}.{type(data).__qualname__}"
        raise ConfigTypeError(
            f"The batch contains a {kind}, which cannot be moved to the device: {kind}(values) raised {error!r}. Add a "
            "method to(device) to the class, or return a dict, a list or a dataclass from collate_fn."
        ) from error


class BaseDataPreprocessor(nn.Module):
    """Move batches to the model's device. Subclass it to normalize or stack the data as well.

    The preprocessor is a submodule of the model, so it is moved to the same device.

    Args:
        non_blocking: whether copies may run asynchronously; by default, those of tensors in pinned memory do.
    """

    device: torch.device

    def __init__(self, *, non_blocking: bool | None = None) -> None:
        super().__init__()
        self.device = _CPU
        self.non_blocking = non_blocking

    def __call__(self, data: Any, training: bool = False) -> Any:
        # This runs in every step, and calling a module takes time even if there is nothing to move.
        idle = self.device == _CPU and type(self).forward is BaseDataPreprocessor.forward
        if idle and not (self._forward_hooks or self._forward_pre_hooks):
            return data
        return super().__call__(data, training)

    def _apply(self, fn: Any, recurse: bool = True) -> BaseDataPreprocessor:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        # Apply `to`, `cuda`, `cpu`, ... to a tensor to find the new device.
        self.device = fn(torch.empty(0, device=self.device)).device
        return self

    def forward(self, data: Any, training: bool = False) -> Any:
        """Return ``data`` on the model's device. ``training`` specifies whether this is a training step."""
        # Data loaders yield CPU tensors, so for a model on the CPU there is nothing to move.
        return data if self.device == _CPU else to_device(data, self.device, non_blocking=self.non_blocking)
