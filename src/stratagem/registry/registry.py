"""The registry: a mapping from names to the classes and functions that configurations can build."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar, overload

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.registry.build import build_from_cfg
from stratagem.registry.import_policy import import_dotted, is_allowed, is_of_allowed_package
from stratagem.registry.name_sources import NameSource
from stratagem.utils import did_you_mean, import_module, import_object, nearest_names
from stratagem.utils.data_names import DataName, is_dotted_name
from stratagem.utils.data_rules import refused_arguments
from stratagem.utils.imports import is_in_unsearched_working_directory, without_working_directory

__all__ = ["Registry", "current_scope", "switch_scope"]

Target = Callable[..., Any]
BuildFunction = Callable[..., Any]
T = TypeVar("T", bound=Target)


# The scope whose registries are searched first.
_CURRENT_SCOPE: ContextVar[str | None] = ContextVar("scope", default=None)


def current_scope() -> str | None:
    """Return the current scope. None means that each registry searches itself first."""
    return _CURRENT_SCOPE.get()


@contextmanager
def switch_scope(scope: str | None) -> Iterator[None]:
    """Make ``scope`` the current scope inside the block; None leaves it unchanged."""
    if scope is None:
        yield
        return
    token = _CURRENT_SCOPE.set(scope)
    try:
        yield
    finally:
        _CURRENT_SCOPE.reset(token)


class Registry:
    """A mapping from names to classes and functions.

    A name is looked up among the registered entries, then the built-in entries, then the name sources, then in the
    parent. ``scope.name`` is looked up only in the registry of that scope. A dotted path such as
    ``my_package.models.Net`` is imported, unless it comes from a data file.

    Args:
        name: The kind of the entries, for error messages, such as ``"model"``.
        parent: The registry to search after this one. This registry becomes a child of it.
        scope: The library that the registry belongs to; the caller's top-level package by default.
        locations: Modules that register entries when they are imported. They are imported the first time that a name is not
            found.
        build_func: Called as ``build_func(cfg, registry=..., default_args=...)`` instead of ``build_from_cfg``. Defaults to the
            parent's ``build_func``.
        builtin_entries: Names and the objects that they refer to, as ``"package.module:Class"``, imported on first use.
        name_sources: Sources of names that are not listed.

    Raises:
        ConfigValueError: if the parent already has a child with this scope.
    """

    def __init__(
        self,
        name: str,
        *,
        parent: Registry | None = None,
        scope: str | None = None,
        locations: Sequence[str] = (),
        build_func: BuildFunction | None = None,
        builtin_entries: Mapping[str, str] | None = None,
        name_sources: Sequence[NameSource] = (),
    ) -> None:
        self._name = name
        self._scope = scope if scope is not None else _scope_of_caller()
        self._parent = parent
        self._children: dict[str, Registry] = {}
        self._entries: dict[str, Target] = {}
        self._builtin_entries = dict(builtin_entries or {})
        self._name_sources = tuple(name_sources)
        self._locations = list(locations)
        self._build_func: BuildFunction = build_func or (build_from_cfg if parent is None else parent.build_func)
        if parent is not None:
            parent._add_child(self)

    @property
    def name(self) -> str:
        """The kind of the entries, such as ``"model"``."""
        return self._name

    @property
    def scope(self) -> str:
        """The name of the library that the registry belongs to."""
        return self._scope

    @property
    def parent(self) -> Registry | None:
        """The registry that is searched after this one."""
        return self._parent

    @property
    def children(self) -> Mapping[str, Registry]:
        """A mapping from scopes to child registries."""
        return dict(self._children)

    @property
    def root(self) -> Registry:
        """The root registry, which has no parent."""
        registry = self
        while registry._parent is not None:
            registry = registry._parent
        return registry

    @property
    def build_func(self) -> BuildFunction:
        """The function that ``build`` calls."""
        return self._build_func

    @property
    def module_dict(self) -> Mapping[str, Target]:
        """A mapping from names to registered entries, without built-in entries and name sources."""
        return dict(self._entries)

    def __len__(self) -> int:
        return len(self._entries.keys() | self._builtin_entries.keys())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.get(name) is not None

    def __repr__(self) -> str:
        return f"Registry({self._name!r}, scope={self._scope!r}, {len(self)} names)"

    @overload
    def register_module(
        self, name: str | Sequence[str] | None = ..., *, force: bool = ..., module: None = ...
    ) -> Callable[[T], T]: ...

    @overload
    def register_module(self, name: str | Sequence[str] | None = ..., *, force: bool = ..., module: T) -> T: ...

    def register_module(
        self, name: str | Sequence[str] | None = None, *, force: bool = False, module: T | None = None
    ) -> T | Callable[[T], T]:
        """Register a class or function, as a decorator or with ``module``. The name defaults to its ``__name__``.

        A registered entry takes precedence over the name sources. With ``force``, it also replaces a registered or built-in
        entry.

        Raises:
            ConfigTypeError: if a name is not a string or the module is not callable.
            ConfigKeyError: if the name is already registered and ``force`` is False.
        """
        if not isinstance(force, bool):
            raise ConfigTypeError(f"force must be a bool, got {force!r}.")
        if not (name is None or isinstance(name, str) or _is_name_list(name)):
            raise ConfigTypeError(f"The name must be a string or a list of strings, got {name!r}.")
        if module is not None:
            self._register(module, name, force=force)
            return module

        def decorate(target: T) -> T:
            self._register(target, name, force=force)
            return target

        return decorate

    def get(self, key: str) -> Target | None:
        """Return the class or function called ``key``, or None if the name is unknown.

        Raises:
            ConfigTypeError: if ``key`` is not a string.
            MissingDependencyError: if the name is known but its library is not installed.
            ConfigValueError: if ``key`` is a dotted path from a data file, and its package is not allowed.
        """
        if not isinstance(key, str):
            raise ConfigTypeError(f"The name to look up must be a string, got {key!r}.")
        with nullcontext() if is_allowed(key) else without_working_directory():
            found = self._find_in_chain(key)
            if found is None:
                found = self._find_in_scope(key)
        return import_dotted(key, self.names) if found is None else found

    def refused_arguments(self, target: Target, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the arguments in ``given`` that a data file must not set for ``target``, each with the reason."""
        kind = given.get("type")
        if isinstance(kind, DataName) and is_of_allowed_package(kind):
            return {}
        return refused_arguments(target, given)

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Build an object from ``cfg``; see :func:`build_from_cfg`."""
        return self._build_func(cfg, *args, **kwargs, registry=self)

    @contextmanager
    def switch_scope_and_registry(self, scope: str | None) -> Iterator[Registry]:
        """Yield the registry of ``scope``, or of the current scope if it is None, and make its scope current in the block.

        Raises:
            ConfigTypeError: if ``scope`` is not a string.
            ConfigKeyError: if no registry has the given scope.
            ConfigValueError: if ``scope`` comes from a data file and the program has not imported that library.
        """
        if not (scope is None or isinstance(scope, str)):
            raise ConfigTypeError(f"The scope must be the name of a package, got {scope!r}.")
        with switch_scope(scope):
            wanted = current_scope()
            registry = self if wanted is None else self._registry_of(wanted, may_import=is_allowed(wanted))
            if registry is None:
                if scope is not None:
                    if not is_allowed(scope):
                        raise ConfigValueError(
                            f"A YAML, JSON or TOML file refers to the scope {str(scope)!r}, but no package with a {self._name} "
                            "registry of this scope has been imported. Such files cannot trigger imports: import the "
                            f"package in the program, or call allow_packages({str(scope)!r})."
                        )
                    known = [item.scope for item in _subtree(self.root)]
                    raise ConfigKeyError(
                        f"No {self._name} registry has the scope {scope!r}. {did_you_mean(scope, known)}"
                    )
                registry = self
            yield registry

    def names(self) -> list[str]:
        """Return all names known to this registry and its parents. Imports the libraries of the name sources."""
        names: set[str] = set()
        for registry in self._chain():
            names.update(registry._entries, registry._builtin_entries)
            for source in registry._name_sources:
                try:
                    names.update(source.names())
                except Exception:  # noqa: BLE001, S112 -- a broken library must not mask the error whose message lists the names
                    continue
        return sorted(names)

    def suggest(self, key: str) -> str:
        """Return a sentence for the error that a name is unknown: the closest names, or why a dotted path is not imported."""
        if is_dotted_name(key) and is_in_unsearched_working_directory(key.replace(":", ".")):
            package = key.replace(":", ".").partition(".")[0]
            near = nearest_names(key, self.names(), most=1)
            return (
                f"{package!r} is in the working directory, which is not searched for modules. Add "
                f"custom_imports=dict(imports=[{package!r}]) to the configuration, or start the program with python -m."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        return did_you_mean(key, self.names())

    @staticmethod
    def split_scope_key(key: str) -> tuple[str | None, str]:
        """Split a key at the first dot into its scope (None if it has no dot) and its name."""
        scope, dot, name = key.partition(".")
        return (scope, name) if dot else (None, key)

    def _chain(self) -> Iterator[Registry]:
        registry: Registry | None = self
        while registry is not None:
            yield registry
            registry = registry._parent

    def _find_in_chain(self, key: str) -> Target | None:
        return next((found for registry in self._chain() if (found := registry._find(key)) is not None), None)

    def _find_in_scope(self, key: str) -> Target | None:
        """Look up ``scope.name`` in the registry with that scope."""
        scope, name = self.split_scope_key(key)
        registry = None if scope is None else self._registry_of(scope, may_import=is_allowed(key))
        # If the full name comes from a data file, so does this part of it.
        return None if registry is None else registry._find(DataName(name) if isinstance(key, DataName) else name)

    def _find(self, name: str) -> Target | None:
        """Look up a name in this registry only: registered entries, locations, built-in entries, name sources."""
        if name not in self._entries and self._locations:
            self._import_locations()
        if name in self._entries:
            return self._entries[name]
        if name in self._builtin_entries:
            target: Target = import_object(self._builtin_entries[name])
            return target
        return next((found for source in self._name_sources if (found := source.find(name)) is not None), None)

    def _import_locations(self) -> None:
        locations, self._locations = self._locations, []
        for location in locations:
            import_module(location)

    def _registry_of(self, scope: str, *, may_import: bool) -> Registry | None:
        def search() -> Registry | None:
            return next((registry for registry in _subtree(self.root) if registry.scope == scope), None)

        found = search()
        if found is None and may_import and _has_registries(scope):
            import_module(f"{scope}.registry")
            found = search()
        return found

    def _register(self, module: Target, name: str | Sequence[str] | None, *, force: bool) -> None:
        if not callable(module):
            raise ConfigTypeError(f"Cannot add {module!r} to the {self._name} registry: it is not callable.")
        names = [module.__name__] if name is None else [name] if isinstance(name, str) else name
        for key in names:
            if not force and (key in self._entries or key in self._builtin_entries):
                holder = self._entries.get(key) or self._builtin_entries[key]
                raise ConfigKeyError(
                    f"{key!r} is already in the {self._name} registry: {holder}. "
                    f"Choose another name, or pass force=True to replace it."
                )
            self._entries[key] = module

    def _add_child(self, child: Registry) -> None:
        if child.scope in self._children:
            raise ConfigValueError(f"The {self._name} registry already has a child with the scope {child.scope!r}.")
        self._children[child.scope] = child


def _subtree(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _subtree(child)


def _has_registries(package: str) -> bool:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    is_package = spec is not None and spec.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(f"{package}.registry") is not None


def _is_name_list(name: object) -> bool:
    return isinstance(name, Sequence) and all(isinstance(item, str) for item in name)


def _scope_of_caller() -> str:
    module: str = sys._getframe(2).f_globals.get("__name__", "stratagem")
    return module.partition(".")[0]
