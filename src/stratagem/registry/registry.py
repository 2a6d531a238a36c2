"""Names for classes and functions, so that a configuration can say what to build."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, overload

from stratagem.errors import ConfigKeyError, ConfigTypeError, ConfigValueError
from stratagem.registry.build import build_from_cfg
from stratagem.registry.import_policy import import_dotted, is_allowed, is_of_allowed_package
from stratagem.registry.name_sources import NameSource
from stratagem.registry.scope import current_scope, switch_scope
from stratagem.utils import did_you_mean, import_module, import_object
from stratagem.utils.data_names import DataName
from stratagem.utils.data_rules import refused_arguments
from stratagem.utils.imports import without_working_directory

__all__ = ["Registry"]

Target = Callable[..., Any]
BuildFunction = Callable[..., Any]
T = TypeVar("T", bound=Target)


class Registry:
    """A table of names and what they stand for.

    A name is looked up among what was registered, then among the ready names, then in the families, then in the
    parent. ``scope.name`` looks in the registry of that scope alone, and a dotted path such as
    ``my_package.models.Net`` is imported, unless a data file wrote it.

    Args:
        name: What its entries are, in errors: ``"model"``.
        parent: The registry to look in after this one; this one becomes its child.
        scope: The name of the library that it belongs to; the caller's top package by default.
        locations: Modules that register entries when they are imported, which happens when a name is first missing.
        build_func: Called as ``build_func(cfg, registry=..., default_args=...)`` in place of ``build_from_cfg``; the
            parent's by default.
        builtin_entries: Names that are known from the start, each with where to find it: ``"package.module:Class"``.
        name_sources: Further ready names that need not be listed.

    Raises:
        ConfigValueError: if the parent has a child of this scope already.
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
        """What its entries are."""
        return self._name

    @property
    def scope(self) -> str:
        """The name of the library that it belongs to."""
        return self._scope

    @property
    def parent(self) -> Registry | None:
        """The registry that is looked in after this one."""
        return self._parent

    @property
    def children(self) -> Mapping[str, Registry]:
        """The registries below this one, by scope."""
        return dict(self._children)

    @property
    def root(self) -> Registry:
        """The registry at the top, which has no parent."""
        registry = self
        while registry._parent is not None:
            registry = registry._parent
        return registry

    @property
    def build_func(self) -> BuildFunction:
        """What ``build`` calls."""
        return self._build_func

    @property
    def module_dict(self) -> Mapping[str, Target]:
        """What was registered, by name; without ready names that nobody asked for."""
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
        """Register a class or function, as a decorator or with ``module``; its own name is the default.

        A registered name goes before a name of a family. With ``force`` it also replaces a registered or ready one.

        Raises:
            ConfigTypeError: if a name is not a text or the module cannot be called.
            ConfigKeyError: if a name is taken.
        """
        if not isinstance(force, bool):
            raise ConfigTypeError(f"force must be a bool, not {force!r}.")
        if not (name is None or isinstance(name, str) or _is_names(name)):
            raise ConfigTypeError(f"A name is a text or a list of texts, not {name!r}.")
        if module is not None:
            self._register(module, name, force=force)
            return module

        def decorate(target: T) -> T:
            self._register(target, name, force=force)
            return target

        return decorate

    def get(self, key: str) -> Target | None:
        """Return what a name stands for, or None where it is unknown.

        Raises:
            ConfigTypeError: if ``key`` is not a text.
            MissingDependencyError: if it is known but its library is not installed.
            ConfigValueError: if a data file wrote a dotted path that the program did not allow.
        """
        if not isinstance(key, str):
            raise ConfigTypeError(f"A name in a registry is a text, not {key!r}.")
        with nullcontext() if is_allowed(key) else without_working_directory():
            found = self._find_in_chain(key)
            if found is None:
                found = self._find_in_scope(key)
        return import_dotted(key, self.names) if found is None else found

    def refused_arguments(self, target: Target, given: Mapping[str, Any]) -> dict[str, str]:
        """Return the arguments in ``given`` that a data file must not give to ``target``, each with the reason."""
        kind = given.get("type")
        if isinstance(kind, DataName) and is_of_allowed_package(kind):
            return {}
        return refused_arguments(target, given)

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """Build what ``cfg`` describes; see ``build_from_cfg``."""
        return self._build_func(cfg, *args, **kwargs, registry=self)

    @contextmanager
    def switch_scope_and_registry(self, scope: str | None) -> Iterator[Registry]:
        """Give the registry of ``scope``, or of the scope that holds here; names are looked up there meanwhile.

        Raises:
            ConfigTypeError: if ``scope`` is not a string.
            ConfigKeyError: if ``scope`` is given and no library has registries of that name.
            ConfigValueError: if a data file names the scope of a library that the program did not import.
        """
        if not (scope is None or isinstance(scope, str)):
            raise ConfigTypeError(f"A scope is the name of a package, not {scope!r}.")
        with switch_scope(scope):
            wanted = current_scope()
            registry = self if wanted is None else self._registry_of(wanted, may_import=is_allowed(wanted))
            if registry is None:
                if scope is not None:
                    if not is_allowed(scope):
                        raise ConfigValueError(
                            f"A data file names the scope {str(scope)!r}, and no {self._name} registry of that scope is "
                            "imported. Data files cannot choose what is imported: let the program import the package or "
                            f"call allow_packages({str(scope)!r})."
                        )
                    known = [item.scope for item in _tree(self.root)]
                    raise ConfigKeyError(
                        f"No {self._name} registry has the scope {scope!r}. {did_you_mean(scope, known)}"
                    )
                registry = self
            yield registry

    def names(self) -> list[str]:
        """Return all names that can be looked up here and in the parents; libraries of families are imported."""
        names: set[str] = set()
        for registry in self._chain():
            names.update(registry._entries, registry._builtin_entries)
            for source in registry._name_sources:
                try:
                    names.update(source.names())
                except Exception:  # noqa: BLE001, S112 -- a broken library must not hide the error that asks for names
                    continue
        return sorted(names)

    @staticmethod
    def split_scope_key(key: str) -> tuple[str | None, str]:
        """Return the scope before the first dot, or None, and the rest."""
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
        """Look up ``scope.name`` in the registry of that scope."""
        scope, name = self.split_scope_key(key)
        registry = None if scope is None else self._registry_of(scope, may_import=is_allowed(key))
        # A part of a data file's name is one, too.
        return None if registry is None else registry._find(DataName(name) if isinstance(key, DataName) else name)

    def _find(self, name: str) -> Target | None:
        """Look here alone: registered, then what the locations register, then ready names, then families."""
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
            return next((registry for registry in _tree(self.root) if registry.scope == scope), None)

        found = search()
        if found is None and may_import and _has_registries(scope):
            import_module(f"{scope}.registry")
            found = search()
        return found

    def _register(self, module: Target, name: str | Sequence[str] | None, *, force: bool) -> None:
        if not callable(module):
            raise ConfigTypeError(f"{module!r} is neither a class nor a function, so {self._name} cannot register it.")
        names = [module.__name__] if name is None else [name] if isinstance(name, str) else name
        for key in names:
            if not force and (key in self._entries or key in self._builtin_entries):
                holder = self._entries.get(key) or self._builtin_entries[key]
                raise ConfigKeyError(
                    f"{key!r} is already registered in {self._name}, for {holder}. "
                    f"Choose another name, or pass force=True to replace it."
                )
            self._entries[key] = module

    def _add_child(self, child: Registry) -> None:
        if child.scope in self._children:
            raise ConfigValueError(f"The {self._name} registry already has a child of the scope {child.scope!r}.")
        self._children[child.scope] = child


def _tree(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _tree(child)


def _has_registries(package: str) -> bool:
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    is_package = spec is not None and spec.submodule_search_locations is not None
    return is_package and importlib.util.find_spec(f"{package}.registry") is not None


def _is_names(name: object) -> bool:
    return isinstance(name, Sequence) and all(isinstance(item, str) for item in name)


def _scope_of_caller() -> str:
    module: str = sys._getframe(2).f_globals.get("__name__", "stratagem")
    return module.partition(".")[0]
