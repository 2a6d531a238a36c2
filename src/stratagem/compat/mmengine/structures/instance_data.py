"""Data of the instances in a sample, such as the objects in an image."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.compat.mmengine.structures.base_data_element import BaseDataElement
from stratagem.errors import ConfigValueError

__all__ = ["InstanceData"]

_INDICES = (str, slice, int, list, Tensor, np.ndarray)
_INTEGERS = (torch.int64, torch.int32)


class InstanceIndexError(ConfigValueError, IndexError):
    """There is no instance with this index."""


class InstanceData(BaseDataElement):
    """Data of the instances in a sample. All fields have the same length, the number of instances."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self._set_own(name, value):
            return
        if not isinstance(value, Sized):
            raise InvalidArgumentError(f"{name!r} must have a length, got {value!r}.")
        if len(self) > 0 and len(value) != len(self):
            raise InvalidArgumentError(
                f"{name!r} has {len(value)} values, but the other fields of this InstanceData have {len(self)}."
            )
        super().__setattr__(name, value)

    __setitem__ = __setattr__

    def __getitem__(self, item: Any) -> Any:
        """Return a field by its name, or an element with some of the instances.

        Args:
            item: a name, an index, a slice, or a list, tensor or array of indices or of booleans.

        Raises:
            AssertionError: if ``item`` is something else, has several dimensions, or has the wrong number of booleans.
            IndexError: if there is no instance with this index.
            ValueError: if a field does not support the selection.
        """
        if not isinstance(item, _INDICES):
            raise InvalidArgumentError(f"InstanceData cannot be indexed with {item!r} ({type(item).__name__}).")
        if isinstance(item, str):
            return getattr(self, item)
        created = type(self)(metainfo=self.metainfo)
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise InstanceIndexError(f"Index {item} out of range! There are {len(self)} instances.")
            item = slice(item, None, len(self))
        if isinstance(item, slice):
            created.set_data({name: value[item] for name, value in self.items()})
            return created
        chosen = self._checked_selection(item)
        for name, value in self.items():
            created[name] = _select(name, value, chosen)
        return created

    def _checked_selection(self, item: Any) -> Tensor:
        chosen = item if isinstance(item, Tensor) else torch.from_numpy(np.asarray(item))
        if isinstance(item, list) and not item:
            chosen = chosen.long()
        if chosen.ndim != 1 or chosen.dtype not in (torch.bool, *_INTEGERS):
            raise InvalidArgumentError(
                f"Instances are selected by a vector of integers or booleans, got {chosen.dtype} of shape "
                f"{tuple(chosen.shape)}."
            )
        if chosen.dtype == torch.bool and len(chosen) != len(self):
            raise InvalidArgumentError(f"{len(chosen)} booleans cannot select from {len(self)} instances.")
        return chosen if chosen.dtype == torch.bool else chosen.long()

    @staticmethod
    def cat(instances_list: list[Any]) -> Any:
        """Return the instances of all elements in one, with the meta information of the first.

        Raises:
            AssertionError: if there are none, or they differ in their fields.
            ValueError: if a field does not support it.
        """
        require(
            len(instances_list) > 0 and all(isinstance(item, InstanceData) for item in instances_list),
            "cat() needs at least one InstanceData, and nothing else.",
        )
        first = instances_list[0]
        if len(instances_list) == 1:
            return first
        keys = set(first.all_keys())
        different = next((item for item in instances_list if set(item.all_keys()) != keys), None)
        if different is not None:
            raise InvalidArgumentError(
                f"There are different keys in `instances_list`: {sorted(keys)} and {sorted(different.all_keys())}."
            )
        created = type(first)(metainfo=first.metainfo)
        for name in first.keys():  # noqa: SIM118 -- not a dict
            created[name] = _concatenate(name, [item[name] for item in instances_list])
        return created

    def __len__(self) -> int:
        return len(self.values()[0]) if self._data_fields else 0


def _select(name: str, value: Any, chosen: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[chosen.to(value.device)]
    if isinstance(value, np.ndarray):
        return value[chosen.cpu().numpy()]
    indices = chosen.nonzero().view(-1).tolist() if chosen.dtype == torch.bool else chosen.tolist()
    if isinstance(value, str):
        return "".join(value[index] for index in indices)
    if isinstance(value, list | tuple):
        return type(value)(value[index] for index in indices)
    if not (hasattr(value, "__getitem__") and hasattr(value, "cat")):
        raise ConfigValueError(
            f"The type of `{name}` is `{type(value)}`, which has no attribute of `cat`, so instances of it cannot be selected."
        )
    parts = [value[slice(index, None, len(value))] for index in indices] or [value[:0]]
    return value.cat(parts)


def _concatenate(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, np.ndarray):
        return np.concatenate(values)
    if isinstance(first, str):
        return "".join(values)
    if isinstance(first, list | tuple):
        return type(first)(item for value in values for item in value)
    if hasattr(first, "cat"):
        return first.cat(values)
    raise ConfigValueError(f"The type of `{name}` is `{type(first)}` which has no attribute of `cat`")
