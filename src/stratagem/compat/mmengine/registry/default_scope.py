"""The default scope: the library in whose registries names without a scope are searched first."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.utils.manager import ManagerMixin, _lock

__all__ = ["DefaultScope"]

_numbers = itertools.count()


class DefaultScope(ManagerMixin):
    """A scope that everything in the process can find. The one that was created last is the current one.

    Args:
        name: the name of the instance.
        scope_name: the scope, such as ``"mmdet"``.
    """

    def __init__(self, name: str, scope_name: str) -> None:
        super().__init__(name)
        require(isinstance(scope_name, str), f"scope_name must be a string, got {scope_name!r}.")
        self._scope_name = scope_name

    @property
    def scope_name(self) -> str:
        """The scope."""
        return self._scope_name

    @classmethod
    def get_current_instance(cls) -> DefaultScope | None:
        """Return the instance that was created last, or None."""
        with _lock:
            return next(reversed(cls._instance_dict.values()), None)

    @classmethod
    @contextmanager
    def overwrite_default_scope(cls, scope_name: str | None) -> Iterator[None]:
        """Make ``scope_name`` the current scope in the block; None changes nothing.

        Instances that the block creates are forgotten at its end.
        """
        if scope_name is None:
            yield
            return
        before = OrderedDict(cls._instance_dict)
        cls.get_instance(f"overwrite-{next(_numbers)}", scope_name=scope_name)
        try:
            yield
        finally:
            cls._instance_dict = before
