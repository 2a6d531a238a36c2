"""A container of data fields and meta information, which are its attributes."""

from __future__ import annotations

import copy
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from stratagem.compat.mmengine.checks import InvalidArgumentError, require
from stratagem.errors import ConfigKeyError, StateError

__all__ = ["BaseDataElement"]

_OWN = ("_metainfo_fields", "_data_fields")


class FieldError(StateError, AttributeError):
    """A field cannot be set or deleted."""


class BaseDataElement:
    """A container of data fields, such as tensors, and of meta information, such as the size of an image.

    Both are attributes: setting an attribute adds a data field. A field is either data or meta information.

    Args:
        metainfo: meta information, which is copied.
        kwargs: data fields.
    """

    def __init__(self, *, metainfo: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self._metainfo_fields: set[str] = set()
        self._data_fields: set[str] = set()
        if metainfo is not None:
            self.set_metainfo(metainfo)
        if kwargs:
            self.set_data(kwargs)

    def set_metainfo(self, metainfo: dict[str, Any]) -> None:
        """Add or replace meta information with a copy of ``metainfo``.

        Raises:
            AssertionError: if it is not a dict.
            AttributeError: if a key is a data field.
        """
        require(isinstance(metainfo, dict), f"metainfo must be a dict, got {type(metainfo).__name__}.")
        for name, value in copy.deepcopy(metainfo).items():
            self.set_field(value, name, field_type="metainfo")

    def set_data(self, data: dict[str, Any]) -> None:
        """Add or replace data fields.

        Raises:
            AssertionError: if ``data`` is not a dict.
            AttributeError: if a key is meta information.
        """
        require(isinstance(data, dict), f"data must be a dict, got {type(data).__name__}.")
        for name, value in data.items():
            setattr(self, name, value)

    def update(self, instance: BaseDataElement) -> None:
        """Add or replace the fields and meta information of another element."""
        require(
            isinstance(instance, BaseDataElement), f"instance must be a BaseDataElement, got {type(instance).__name__}."
        )
        self.set_metainfo(instance.metainfo)
        self.set_data(dict(instance.items()))

    def new(self, *, metainfo: dict[str, Any] | None = None, **kwargs: Any) -> Self:
        """Return an element with the same meta information and data, or with those that are given."""
        created = type(self)()
        created.set_metainfo(self.metainfo if metainfo is None else metainfo)
        created.set_data(kwargs or dict(self.items()))
        return created

    def clone(self) -> Self:
        """Return an element with a copy of the meta information and the same data."""
        return self.new()

    def keys(self) -> list[str]:
        """Return the names of the data fields; a field that a property of the class stores has the name of the property."""
        # A property called `name` may store its value as `_name`, which is not a field of its own.
        stored = {f"_{name}" for name in self._data_fields if isinstance(getattr(type(self), name, None), property)}
        return list(self._data_fields - stored)

    def metainfo_keys(self) -> list[str]:
        """Return the names of the meta information."""
        return list(self._metainfo_fields)

    def values(self) -> list[Any]:
        """Return the data fields."""
        return [getattr(self, name) for name in self.keys()]

    def metainfo_values(self) -> list[Any]:
        """Return the values of the meta information."""
        return [getattr(self, name) for name in self.metainfo_keys()]

    def all_keys(self) -> list[str]:
        """Return the names of the meta information and of the data fields."""
        return self.metainfo_keys() + self.keys()

    def all_values(self) -> list[Any]:
        """Return the values of the meta information and of the data fields."""
        return self.metainfo_values() + self.values()

    def all_items(self) -> Iterator[tuple[str, Any]]:
        """Return an iterator over names and values of meta information and data."""
        return ((name, getattr(self, name)) for name in self.all_keys())

    def items(self) -> Iterator[tuple[str, Any]]:
        """Return an iterator over the names and values of the data fields."""
        return ((name, getattr(self, name)) for name in self.keys())

    def metainfo_items(self) -> Iterator[tuple[str, Any]]:
        """Return an iterator over the names and values of the meta information."""
        return ((name, getattr(self, name)) for name in self.metainfo_keys())

    @property
    def metainfo(self) -> dict[str, Any]:
        """The meta information by name."""
        return dict(self.metainfo_items())

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN or not self._set_own(name, value):
            self.set_field(value, name)

    def _set_own(self, name: str, value: Any) -> bool:
        """Set one of the tables of fields, once; return False for other names."""
        if name not in _OWN:
            return False
        if name in self.__dict__:
            raise FieldError(f"{name} has been used as a private attribute, which is immutable.")
        super().__setattr__(name, value)
        return True

    def __delattr__(self, item: str) -> None:
        if item in _OWN:
            raise FieldError(f"{item} has been used as a private attribute, which is immutable.")
        super().__delattr__(item)
        self._metainfo_fields.discard(item)
        self._data_fields.discard(item)

    __delitem__ = __delattr__

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field, or ``default`` if there is none."""
        return getattr(self, key, default)

    def pop(self, *args: Any) -> Any:
        """Remove a field and return it: ``pop(name)`` or ``pop(name, default)``.

        Raises:
            AssertionError: if there are more arguments.
            KeyError: if there is no field and no default.
        """
        require(0 < len(args) < 3, f"pop() takes a name and a default, got {len(args)} arguments.")
        name = args[0]
        if name not in self:
            if len(args) == 2:
                return args[1]
            raise ConfigKeyError(
                f"{name!r} is neither meta information nor data. There are: {sorted(self.all_keys())}."
            )
        self._metainfo_fields.discard(name)
        self._data_fields.discard(name)
        return self.__dict__.pop(*args)

    def __contains__(self, item: str) -> bool:
        return item in self._data_fields or item in self._metainfo_fields

    def set_field(
        self,
        value: Any,
        name: str,
        dtype: type | tuple[type, ...] | None = None,
        field_type: str = "data",
    ) -> None:
        """Set a field. For the setters of properties, which check the type of their value.

        Args:
            value: the value.
            name: the name.
            dtype: the class that the value must have, or several.
            field_type: ``"data"`` or ``"metainfo"``.

        Raises:
            AssertionError: if the value has another class, or ``field_type`` is unknown.
            AttributeError: if the name is a field of the other kind.
        """
        # Runs several times per sample, so the messages, which may contain a whole tensor, are only written for an error.
        if field_type not in ("metainfo", "data"):
            raise InvalidArgumentError(f"field_type must be 'metainfo' or 'data', got {field_type!r}.")
        if dtype is not None and not isinstance(value, dtype):
            raise InvalidArgumentError(f"{name} must be a {dtype}, got {value!r} ({type(value).__name__}).")
        fields, others = self._data_fields, self._metainfo_fields
        if field_type == "metainfo":
            fields, others = others, fields
        if name in others:
            other = "data" if field_type == "metainfo" else "metainfo"
            raise FieldError(f"{name!r} cannot be a field of {field_type}, because it is a field of {other} already.")
        fields.add(name)
        super().__setattr__(name, value)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return an element whose fields with a method ``to``, such as tensors, are converted with it."""
        return self._mapped(lambda value: value.to(*args, **kwargs), lambda value: hasattr(value, "to"))

    def cpu(self) -> Self:
        """Return an element with all tensors on the CPU."""
        return self._mapped(lambda value: value.cpu())

    def cuda(self) -> Self:
        """Return an element with all tensors on the CUDA device."""
        return self._mapped(lambda value: value.cuda())

    def npu(self) -> Self:
        """Return an element with all tensors on the Ascend device."""
        return self.to("npu")

    def mlu(self) -> Self:
        """Return an element with all tensors on the Cambricon device."""
        return self.to("mlu")

    def musa(self) -> Self:
        """Return an element with all tensors on the Moore Threads device."""
        return self.to("musa")

    def detach(self) -> Self:
        """Return an element whose tensors are detached from the graph."""
        return self._mapped(lambda value: value.detach())

    def numpy(self) -> Self:
        """Return an element with NumPy arrays instead of tensors."""
        return self._mapped(lambda value: value.detach().cpu().numpy())

    def to_tensor(self) -> Self:
        """Return an element with tensors instead of NumPy arrays, which share their memory."""
        return self._mapped(
            lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value.to_tensor(),
            lambda value: isinstance(value, np.ndarray | BaseDataElement),
        )

    def _mapped(self, function: Callable[[Any], Any], applies: Callable[[Any], bool] | None = None) -> Self:
        """Return an element with a function applied to those fields for which it makes sense: tensors and elements."""
        created = self.new()
        for name, value in self.items():
            if isinstance(value, Tensor | BaseDataElement) if applies is None else applies(value):
                created.set_data({name: function(value)})
        return created

    def to_dict(self) -> dict[str, Any]:
        """Return meta information and data in a dict, in which elements are dicts, too."""
        return {
            name: value.to_dict() if isinstance(value, BaseDataElement) else value for name, value in self.all_items()
        }

    def __repr__(self) -> str:
        meta = _describe(dict(self.metainfo_items()))
        data = _describe(dict(self.items()))
        return (
            f"<{type(self).__name__}(\n\n    META INFORMATION{_indented(meta)}\n\n    DATA FIELDS{_indented(data)}\n) "
            f"at {hex(id(self))}>"
        )


def _describe(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n{name}: {_indented(_describe(item))}" for name, item in value.items())
    return repr(value)


def _indented(text: str) -> str:
    """Return text with all lines except the first indented."""
    first, newline, rest = text.partition("\n")
    return first + newline + textwrap.indent(rest, "    ", lambda _: True)
