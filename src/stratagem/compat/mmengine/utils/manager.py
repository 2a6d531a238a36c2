"""Classes whose instances can be found by name from everywhere in the process."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import OrderedDict
from typing import Any, Self

from stratagem.compat.mmengine.checks import require
from stratagem.errors import StateError

__all__ = ["ManagerMeta", "ManagerMixin"]

_lock = threading.RLock()


class NoInstanceError(StateError, RuntimeError):
    """A class was asked for its current instance before it had one."""


class ManagerMeta(type):
    """Metaclass that gives each class its own table of instances. The constructor must have an argument ``name``."""

    _instance_dict: OrderedDict[str, Any]

    def __init__(cls, *args: Any) -> None:
        cls._instance_dict = OrderedDict()
        require(
            "name" in inspect.getfullargspec(cls).args,
            f"The constructor of {cls.__name__} has no argument `name`, which identifies the instance. Add it.",
        )
        super().__init__(*args)


class ManagerMixin(metaclass=ManagerMeta):
    """Base class of classes whose instances can be found by name.

    Args:
        name: the name of the instance, which must not be empty.
    """

    def __init__(self, name: str = "", **_: Any) -> None:
        require(isinstance(name, str) and name, f"`name` must be a string that is not empty, got {name!r}.")
        self._instance_name = name

    @classmethod
    def get_instance(cls, name: str, **kwargs: Any) -> Self:
        """Return the instance with this name; create it with ``kwargs`` if there is none.

        If the instance exists and ``kwargs`` are given, they are ignored with a warning.
        """
        require(isinstance(name, str), f"The name of an instance must be a string, got {name!r}.")
        with _lock:
            instances = cls._instance_dict
            if name not in instances:
                instances[name] = cls(name=name, **kwargs)
            elif kwargs:
                warnings.warn(
                    f"{cls.__name__} {name!r} exists already, so these arguments are ignored: {', '.join(kwargs)}.",
                    stacklevel=2,
                )
            found: Self = instances[name]
            return found

    @classmethod
    def get_current_instance(cls) -> Any:
        """Return the instance that was created last.

        Raises:
            RuntimeError: if there is none.
        """
        with _lock:
            if not cls._instance_dict:
                raise NoInstanceError(
                    f"{cls.__name__} has no instance yet. Call {cls.__name__}.get_instance(name=...) first."
                )
            return next(reversed(cls._instance_dict.values()))

    @classmethod
    def check_instance_created(cls, name: str) -> bool:
        """Return whether there is an instance with this name."""
        return name in cls._instance_dict

    @classmethod
    def unused_name(cls, name: str) -> str:
        """Return ``name``, or ``<name>_<number>`` with the lowest number from 1 that no instance has.

        Runs that start in the same second have equal names; with this method they do not share their instances.
        """
        with _lock:
            candidate, number = name, 0
            while candidate in cls._instance_dict:
                number += 1
                candidate = f"{name}_{number}"
            return candidate

    @property
    def instance_name(self) -> str:
        """The name of the instance."""
        return self._instance_name
