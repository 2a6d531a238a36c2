"""Move batches to the model's device."""

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

__all__ = ["BaseDataPreprocessor", "to_device"]

_CPU = torch.device("cpu")
_WITHOUT_TENSORS = (str, bytes, bytearray, memoryview, range, int, float, complex, np.ndarray, np.generic)
_BUILT_IN = frozenset({dict, list, tuple})


def to_device(data: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Move all tensors in ``data`` to ``device``, without changing ``data``.

    Containers are mappings, sequences, sets and dataclasses, at any depth. A container with nothing to move is returned as
    is; otherwise, a new container of the same type, with the same other attributes, is returned. Objects with a ``to``
    method, such as packed sequences, are moved by calling it. Anything else is returned unchanged.

    Raises:
        ConfigTypeError: if the class of a container cannot be created with the moved values.
    """

    def move(value: Any) -> Any:
        return to_device(value, device, non_blocking=non_blocking)

    if isinstance(data, Tensor):
        return data if data.device == device else data.to(device, non_blocking=non_blocking)
    if data is None or isinstance(data, _WITHOUT_TENSORS):
        return data
    if type(data) not in _BUILT_IN and callable(getattr(data, "to", None)):
        return _move_by_method(data, device, non_blocking)
    if isinstance(data, Mapping):
        return _with_items(data, move)
    if isinstance(data, Sequence | AbstractSet | deque):
        return _with_elements(data, move)
    if is_dataclass(data) and not isinstance(data, type):
        names = [field.name for field in fields(data) if hasattr(data, field.name)]
        return _with_fields(data, {name: move(getattr(data, name)) for name in names})
    return data


def _move_by_method(data: Any, device: torch.device, non_blocking: bool) -> Any:
    """Return ``data.to(device)``. Not every ``to`` accepts ``non_blocking``, and some move in place and return None."""
    kind: Any = type(data)
    options = {"non_blocking": True} if non_blocking and _accepts_non_blocking(kind) else {}
    moved = data.to(device, **options)
    return data if moved is None else moved


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
        non_blocking: whether copies from pinned memory may overlap with computation.
    """

    device: torch.device

    def __init__(self, *, non_blocking: bool = False) -> None:
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
