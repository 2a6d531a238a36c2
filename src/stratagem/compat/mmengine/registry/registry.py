"""The registry of MMEngine: a mapping from names to classes and functions, in a tree with one registry for each library."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.config.utils import MODULE2PACKAGE
from stratagem.compat.mmengine.logging.logger import print_log
from stratagem.compat.mmengine.registry.default_scope import DefaultScope
from stratagem.compat.mmengine.utils.misc import get_object_from_string, is_seq_of
from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError, StateError
from stratagem.registry.import_policy import is_allowed
from stratagem.utils import import_module, import_object

__all__ = ["Registry"]

# The call that creates a registry, seen from `_scope_of_caller`.
_CALLER_OF_CONSTRUCTOR: Final = 2


class RegistryImportError(StateError, RuntimeError):
    """The module that a dotted path names failed during its import."""


class Registry:
    """A mapping from names to classes and functions.

    A name is looked up here, then in the parents. ``scope.name`` is looked up in the registry of that scope, whose library is
    imported. A dotted path that no registry has is imported.

    Args:
        name: the kind of the entries, such as ``"model"``.
        build_func: called as ``build_func(cfg, *args, registry=..., **kwargs)`` by :meth:`build`. By default that of the parent,
            or ``build_from_cfg``.
        parent: the registry to search after this one, which becomes its child.
        scope: the library of the registry; the package of the caller by default.
        locations: modules that register entries; they are imported at the first look-up.

    Raises:
        AssertionError: if the parent is not a registry or has a child with this scope, or the scope is not a string.
    """

    def __init__(
        self,
        name: str,
        build_func: Callable[..., Any] | None = None,
        parent: Registry | None = None,
        scope: str | None = None,
        locations: Sequence[str] = (),
    ) -> None:
        require(scope is None or isinstance(scope, str), f"The scope must be a string, got {scope!r}.")
        require(parent is None or isinstance(parent, Registry), f"The parent must be a Registry, got {parent!r}.")
        self._name = name
        self._module_dict: dict[str, Any] = {}
        self._children: dict[str, Registry] = {}
        self._locations = locations
        self._imported = False
        self._scope = _scope_of_caller() if scope is None else scope
        self.parent = parent
        if parent is not None:
            parent._add_child(self)
        if build_func is None:
            build_func = (
                import_object("stratagem.compat.mmengine.registry.build_functions:build_from_cfg")
                if parent is None
                else parent.build_func
            )
        self.build_func: Callable[..., Any] = build_func

    def __len__(self) -> int:
        return len(self._module_dict)

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __repr__(self) -> str:
        table = Table("Names", "Objects", title=f"Registry of {self._name}")
        for name, item in sorted(self._module_dict.items()):
            table.add_row(name, str(item))
        console = Console()
        with console.capture() as capture:
            console.print(table, end="")
        return capture.get()

    @staticmethod
    def infer_scope() -> str:
        """Return the top-level package of the caller's caller."""
        return _scope_of_caller()

    @staticmethod
    def split_scope_key(key: str) -> tuple[str | None, str]:
        """Split a key at the first dot into its scope (None if it has no dot) and its name."""
        scope, dot, name = key.partition(".")
        return (scope, name) if dot else (None, key)

    @property
    def name(self) -> str:
        """The kind of the entries."""
        return self._name

    @property
    def scope(self) -> str:
        """The library that the registry belongs to."""
        return self._scope

    @property
    def module_dict(self) -> dict[str, Any]:
        """The entries of this registry by name; it is not a copy."""
        return self._module_dict

    @property
    def children(self) -> dict[str, Registry]:
        """The children by scope."""
        return self._children

    @property
    def root(self) -> Registry:
        """The registry at the root of the tree."""
        registry = self
        while registry.parent is not None:
            registry = registry.parent
        return registry

    @contextmanager
    def switch_scope_and_registry(self, scope: str | None) -> Iterator[Registry]:
        """Make ``scope`` the default scope in the block, unless it is None, and yield the registry of the default scope.

        Without a default scope, or if no registry has it, this registry is yielded; the latter with a warning.
        """
        with DefaultScope.overwrite_default_scope(scope):
            current = DefaultScope.get_current_instance()
            yield self if current is None else self._registry_of(current.scope_name)

    def _registry_of(self, scope: str) -> Registry:
        found = self._find_registry(scope)
        if found is not None:
            return found
        install = f" Install it: pip install {MODULE2PACKAGE[scope]}." if scope in MODULE2PACKAGE else ""
        _log(
            f"No {self.name} registry has the scope {scope!r}, so that of {self.scope!r} is used instead. Check the scope, and "
            f"whether the package {scope!r} is installed and has a module `registry`.{install}",
            logging.WARNING,
        )
        return self

    def _find_registry(self, scope: str) -> Registry | None:
        """Return the registry of a scope in this tree, after importing its library; None if there is none."""
        root = self.root
        found = root._search_child(scope)
        if found is None and _has_registries(scope):
            try:
                importlib.import_module(f"{scope}.registry")
            except (ImportError, AttributeError) as error:
                _log(f"{scope}.registry cannot be imported: {error}", logging.WARNING)
            found = root._search_child(scope)
        return found

    def import_from_location(self) -> None:
        """Import the modules that register the entries of this registry, once."""
        if self._imported:
            return
        self._imported = True
        try:
            # Old releases of these libraries register their classes with a function, not with locations.
            if not self._locations and self.scope in MODULE2PACKAGE and self.scope != "mmengine":
                self._register_all_modules()
            for location in self._locations:
                import_module(location)
        except Exception:
            self._imported = False  # The next look-up reports the error again.
            raise

    def _register_all_modules(self) -> None:
        try:
            register = importlib.import_module(f"{self.scope}.utils").register_all_modules
        except (ImportError, AttributeError) as error:
            _log(f"The classes of {self.scope} cannot be registered: {error}", logging.WARNING)
            return
        register(False)

    def get(self, key: str) -> Any:
        """Return the class or function called ``key``, or None if the name is unknown.

        Raises:
            TypeError: if ``key`` is not a string.
            RuntimeError: if ``key`` is a dotted path and its module fails during its import.
            ValueError: if ``key`` is a dotted path from a YAML, JSON or TOML file, which must not import modules.
        """
        if not isinstance(key, str):
            raise ConfigTypeError(f"The name to look up must be a string, got {key!r} ({type(key).__name__}).")
        scope, name = self.split_scope_key(key)
        self.import_from_location()
        if scope is None:
            found = self._find_in_chain(name)
        elif scope == self._scope:
            found = self._module_dict.get(name)
        else:
            found = self._find_in_scope(scope, name)
        return self._import(key) if found is None and scope is not None else found

    def _find_in_chain(self, name: str) -> Any:
        registry: Registry | None = self
        while registry is not None:
            if name not in registry._module_dict:
                registry.import_from_location()
            if name in registry._module_dict:
                return registry._module_dict[name]
            registry = registry.parent
        return None

    def _find_in_scope(self, scope: str, name: str) -> Any:
        child = self._children.get(scope) or self._find_registry(scope)
        if child is None:
            return None
        return child.get(name) if child is not self else child._module_dict.get(name)

    def _import(self, key: str) -> Any:
        if not is_allowed(key):
            raise ConfigValueError(
                f"A YAML, JSON or TOML file refers to {str(key)!r}, which no registry has. Such files cannot import modules: "
                "register the class, or use a Python configuration."
            )
        try:
            return get_object_from_string(key)
        except Exception as error:
            raise RegistryImportError(f"{key} cannot be imported: {type(error).__name__}: {error}") from error

    def _search_child(self, scope: str) -> Registry | None:
        """Return the registry of a scope in the tree below this registry, including itself."""
        if self._scope == scope:
            return self
        return next(
            (found for child in self._children.values() if (found := child._search_child(scope)) is not None), None
        )

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Build an object with ``build_func``; see ``build_from_cfg``."""
        return self.build_func(cfg, *args, **kwargs, registry=self)

    def _add_child(self, registry: Registry) -> None:
        require(
            registry.scope not in self._children,
            f"The {self.name} registry has a child with the scope {registry.scope!r} already. Choose another scope.",
        )
        self._children[registry.scope] = registry

    def register_module(self, name: str | Sequence[str] | None = None, force: bool = False, module: Any = None) -> Any:
        """Register a class or function, as a decorator or with ``module``.

        Args:
            name: its name, or several names; its ``__name__`` by default.
            force: whether it replaces an entry with the same name.
            module: the class or function.

        Raises:
            TypeError: if the name is not a string or a list of strings, ``force`` is not a bool, or ``module`` is not callable.
            KeyError: if the name is registered already and ``force`` is False.
        """
        if not isinstance(force, bool):
            raise ConfigTypeError(f"force must be a boolean, but got {type(force)}")
        if not (name is None or isinstance(name, str) or is_seq_of(name, str)):
            raise ConfigTypeError(f"name must be None, an instance of str, or a sequence of str, but got {type(name)}")

        def register(item: Any) -> Any:
            self._register_module(module=item, module_name=name, force=force)
            return item

        return register if module is None else register(module)

    def _register_module(
        self, module: Any, module_name: str | Sequence[str] | None = None, force: bool = False
    ) -> None:
        if not callable(module):
            raise ConfigTypeError(f"module must be Callable, but got {type(module)}")
        names = (
            [module.__name__] if module_name is None else [module_name] if isinstance(module_name, str) else module_name
        )
        for name in names:
            if not force and name in self._module_dict:
                raise ConfigKeyError(
                    f"{name} is already registered in {self.name} at {self._module_dict[name].__module__}. Choose another "
                    "name, or pass force=True to replace it."
                )
            self._module_dict[name] = module


def _scope_of_caller() -> str:
    module: str = sys._getframe(_CALLER_OF_CONSTRUCTOR).f_globals.get("__name__", "mmengine")
    return module.partition(".")[0]


def _has_registries(package: str) -> bool:
    if not package.isidentifier() or not is_allowed(package):
        return False
    try:
        return importlib.util.find_spec(f"{package}.registry") is not None
    except (ImportError, AttributeError, ValueError):
        return False


def _log(message: str, level: int) -> None:
    print_log(message, logger="current", level=level)
