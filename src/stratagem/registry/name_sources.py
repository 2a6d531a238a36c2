"""Whole families of ready names, found in the libraries that define them, which are imported when first asked."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, final

from stratagem.errors import ConfigValueError
from stratagem.registry.import_policy import is_allowed
from stratagem.utils import import_module, import_object

__all__ = ["ModelZoo", "NameSource", "PretrainedFactories", "ClassesOf"]


class NameSource(ABC):
    """Names that a registry knows without listing them."""

    @abstractmethod
    def find(self, name: str) -> Callable[..., Any] | None:
        """Return what ``name`` stands for, or None where it is no name of this family."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the names to choose from in suggestions; may import the library, if it is installed."""


@final
class ClassesOf(NameSource):
    """Every subclass of ``base`` in ``module``, by its name and by its dotted path.

    Args:
        module: Where to look, such as ``"torch.optim"``.
        base: What to accept, as ``"module:Class"``.
        aliases: Further names, each with the name in ``module`` that it stands for.
        prefix: What every name begins with, such as ``"schedulefree."``; then the library is imported only when it is
            meant.
    """

    def __init__(
        self, module: str, base: str, aliases: Mapping[str, str] = MappingProxyType({}), *, prefix: str = ""
    ) -> None:
        self._module = module
        self._base = base
        self._aliases = dict(aliases)
        self._prefix = prefix

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the class of this name, or None."""
        if not name.startswith(self._prefix):
            return None
        short = name.removeprefix(f"{self._module}.").removeprefix(self._prefix)
        if not short.isidentifier() or short.startswith("_"):
            return None
        found = getattr(import_module(self._module), self._aliases.get(short, short), None)
        return found if self._accepts(found) else None

    def names(self) -> Iterable[str]:
        """Return the names of the classes, behind the prefix alone; of a library with one only once it was imported."""
        if self._prefix and self._module not in sys.modules:
            return ()
        members = vars(import_module(self._module)).items()
        own = [name for name, found in members if self._accepts(found) and not name.startswith("_")]
        return [f"{self._prefix}{name}" for name in (*own, *self._aliases)]

    def _accepts(self, found: object) -> bool:
        return isinstance(found, type) and issubclass(found, import_object(self._base))


@final
class PretrainedFactories(NameSource):
    """Class methods that make a model: ``transformers.AutoModel.from_pretrained``, and the classes themselves.

    Args:
        module: The library, whose name must stand before the class, so that it is imported only when it is meant.
        bases: Which classes to accept, each as ``"module:Class"``.
        methods: Which of their class methods to accept.
    """

    def __init__(self, module: str, bases: Sequence[str], methods: Sequence[str]) -> None:
        self._module = module
        self._bases = tuple(bases)
        self._methods = frozenset(methods)

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the class or class method of this name, or None."""
        library, _, rest = name.partition(".")
        class_name, _, method = rest.partition(".")
        if library != self._module or class_name.startswith("_") or not (not method or method in self._methods):
            return None
        found = getattr(import_module(self._module), class_name, None)
        if not (isinstance(found, type) and issubclass(found, tuple(import_object(base) for base in self._bases))):
            return None
        return getattr(found, method, None) if method else found

    def names(self) -> Iterable[str]:
        """Return nothing: there are thousands, and listing them imports each one's module."""
        return ()


@final
class ModelZoo(NameSource):
    """Models that a library makes from a name: ``timm.resnet18`` is ``timm.create_model("resnet18", ...)``.

    Args:
        prefix: What stands before the library's own name, with the dot.
        maker: The function that takes the name first, as ``"module:function"``.
        list_function: The function that returns all names.
    """

    def __init__(self, prefix: str, factory: str, list_function: str) -> None:
        self._prefix = prefix
        self._factory = factory
        self._list_function = list_function

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the function that makes the model of this name, or None if the prefix is different.

        Raises:
            ConfigValueError: if a data file names a place to load the model from.
        """
        if not name.startswith(self._prefix):
            return None
        model = name.removeprefix(self._prefix)
        if ":" in model and not is_allowed(name):
            raise ConfigValueError(
                f"A data file names {str(name)!r}, a place from which the library would load a model and its configuration. "
                "Name a model that the library lists, or write this part of the configuration in Python."
            )
        # What follows a dot names the weights, as in timm.resnet18.a1_in1k; a colon, a place to load the model from.
        if ":" not in model and model.partition(".")[0] not in import_object(self._list_function)():
            return None
        return partial(import_object(self._factory), model)

    def names(self) -> Iterable[str]:
        """Return all names that the library lists."""
        return [f"{self._prefix}{name}" for name in import_object(self._list_function)()]
