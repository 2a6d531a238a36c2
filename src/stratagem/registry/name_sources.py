"""Sources of names that a registry finds in installed libraries, which are imported when a name is first looked up."""

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
    """A set of names that a registry can look up without listing them."""

    @abstractmethod
    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the class or function called ``name``; None if this source does not have the name."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """Return the names to suggest in error messages; may import the library."""


@final
class ClassesOf(NameSource):
    """The subclasses of ``base`` in ``module``, by class name and by dotted path.

    Args:
        module: The module to search, such as ``"torch.optim"``.
        base: The base class, as ``"module:Class"``.
        aliases: Additional names, each mapped to the name in ``module``.
        prefix: The prefix of all names, such as ``"schedulefree."``. With a prefix, the module is imported only when a name
            with this prefix is looked up.
    """

    def __init__(
        self, module: str, base: str, aliases: Mapping[str, str] = MappingProxyType({}), *, prefix: str = ""
    ) -> None:
        self._module = module
        self._base = base
        self._aliases = dict(aliases)
        self._prefix = prefix

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the class called ``name``, or None."""
        if not name.startswith(self._prefix):
            return None
        short = name.removeprefix(f"{self._module}.").removeprefix(self._prefix)
        if not short.isidentifier() or short.startswith("_"):
            return None
        found = getattr(import_module(self._module), self._aliases.get(short, short), None)
        return _current(found) if isinstance(found, type) and self._accepts(found) else None

    def names(self) -> Iterable[str]:
        """Return the names of the classes, with the prefix; none if there is a prefix and the module is not imported yet."""
        if self._prefix and self._module not in sys.modules:
            return ()
        members = vars(import_module(self._module)).items()
        classes = [name for name, found in members if self._accepts(found) and not name.startswith("_")]
        return [f"{self._prefix}{name}" for name in (*classes, *self._aliases)]

    def _accepts(self, found: object) -> bool:
        return isinstance(found, type) and issubclass(found, import_object(self._base))


def _current(found: type) -> type:
    """Return the class from which a deprecated alias is derived; torchmetrics has such aliases, such as ``Perplexity``."""
    base = found.__base__
    return base if base is not None and found.__module__.endswith("._deprecated") else found


@final
class PretrainedFactories(NameSource):
    """Model classes and their factory methods, such as ``transformers.AutoModel.from_pretrained``.

    Args:
        module: The library. All names start with its name, and it is imported only when such a name is looked up.
        bases: The base classes to accept, each as ``"module:Class"``.
        methods: The class methods to accept.
    """

    def __init__(self, module: str, bases: Sequence[str], methods: Sequence[str]) -> None:
        self._module = module
        self._bases = tuple(bases)
        self._methods = frozenset(methods)

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return the class or class method called ``name``, or None."""
        library, _, rest = name.partition(".")
        class_name, _, method = rest.partition(".")
        if library != self._module or class_name.startswith("_") or not (not method or method in self._methods):
            return None
        found = getattr(import_module(self._module), class_name, None)
        if not (isinstance(found, type) and issubclass(found, tuple(import_object(base) for base in self._bases))):
            return None
        return getattr(found, method, None) if method else found

    def names(self) -> Iterable[str]:
        """Return no names: there are thousands, and listing them would import every module."""
        return ()


@final
class ModelZoo(NameSource):
    """Models that a library creates from their names: ``timm.resnet18`` calls ``timm.create_model("resnet18", ...)``.

    Args:
        prefix: The prefix of all names, including the dot.
        factory: The function that takes a model name as its first argument, as ``"module:function"``.
        list_function: The function that returns all model names, as ``"module:function"``.
    """

    def __init__(self, prefix: str, factory: str, list_function: str) -> None:
        self._prefix = prefix
        self._factory = factory
        self._list_function = list_function

    def find(self, name: str) -> Callable[..., Any] | None:
        """Return a function that creates the model called ``name``, or None if there is no such model.

        Raises:
            ConfigValueError: if a name in a data file is a location to load the model from.
        """
        if not name.startswith(self._prefix):
            return None
        model = name.removeprefix(self._prefix)
        if ":" in model and not is_allowed(name):
            raise ConfigValueError(
                f"A data file names {str(name)!r}, a location from which the library would load a model and its "
                "configuration. Name a model in the library, or write this part of the configuration in Python."
            )
        # After a dot comes the name of the weights, as in timm.resnet18.a1_in1k. A colon marks a location such as hf-hub:name.
        if ":" not in model and model.partition(".")[0] not in import_object(self._list_function)():
            return None
        return partial(import_object(self._factory), model)

    def names(self) -> Iterable[str]:
        """Return the names of all models in the library."""
        return [f"{self._prefix}{name}" for name in import_object(self._list_function)()]
