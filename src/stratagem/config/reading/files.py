"""Read a configuration file and its bases."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from stratagem.config.merge import BaseEdits, is_same, merge
from stratagem.config.reading.custom_imports import CUSTOM_IMPORTS
from stratagem.config.reading.data_files import read_data
from stratagem.config.reading.data_languages import DATA_SUFFIXES
from stratagem.config.reading.lazy import BaseImport, locate_base
from stratagem.config.reading.lines import line_of
from stratagem.config.reading.placeholders import BaseValues
from stratagem.config.reading.python_files import read_python
from stratagem.config.reading.source import Origin, Source
from stratagem.errors import (
    ConfigFileError,
    ConfigFileNotFoundError,
    ConfigKeyError,
    ConfigParsingError,
    ConfigTypeError,
    ConfigValueError,
    MissingDependencyError,
)
from stratagem.utils.data_names import DataName

__all__ = ["Layers", "Reader", "merge_layers"]

Layers = tuple[Source, ...]

BASE = "_base_"
DEPRECATION = "_deprecation_"
SUFFIXES = DATA_SUFFIXES | {".py"}


@final
@dataclass(frozen=True, slots=True)
class Reader:
    """Reads files and their bases into layers.

    Args:
        root: The folder that must contain the bases of data files.
        lazy: Whether Python files are pure-Python configurations; None detects it for each file.
        environment: Whether placeholders may read environment variables.
        programs: Whether Python files may be read, which executes them.
        kept: The kinds of placeholders that are not replaced.
        as_mmengine: Whether to keep what only MMEngine keeps: ``_delete_`` in a dict that replaces nothing, and the functions of
            a pure-Python configuration.
        chain: The files that led to the current file through their bases, outermost first.
        seen: The layers of the files that have been read, so that a file with two dependents is read once.
    """

    root: Path
    lazy: bool | None = None
    environment: bool = True
    programs: bool = True
    kept: Collection[str] = ()
    as_mmengine: bool = False
    chain: tuple[Path, ...] = ()
    seen: dict[Path, Layers] = field(default_factory=dict)

    def read_file(self, path: Path) -> Layers:
        """Return a file's layers, preceded by the layers of its bases.

        Raises:
            ConfigFileError: if a file cannot be read, or its suffix is not .py, .yaml, .yml, .json or .toml.
            ConfigParsingError: if a file is invalid, or the bases form a cycle.
            ConfigKeyError: if two bases of a file set the same key.
            ConfigValueError: if a base of a data file is a program or is outside ``root``.
        """
        if path in self.chain:
            circle = " -> ".join(map(str, (*self.chain[self.chain.index(path) :], path)))
            raise ConfigParsingError(f"The bases of the configuration files form a cycle: {circle}.")
        if path in self.seen:
            return self.seen[path]
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigParsingError(f"{path} is not UTF-8 text.") from error
        except OSError as error:
            led = f" It is a base of {self.chain[-1]}." if self.chain else ""
            kind = ConfigFileNotFoundError if isinstance(error, FileNotFoundError) else ConfigFileError
            raise kind(f"{path} cannot be read: {error.strerror or error}.{led}") from error
        self.seen[path] = self.read_text(text, path.suffix, str(path))
        return self.seen[path]

    def read_text(self, text: str, suffix: str, name: str) -> Layers:
        """Return the layers of ``text``, which is in the language of ``suffix``; ``name`` is the file name for errors."""
        if suffix not in SUFFIXES:
            raise ConfigFileError(f"{name} has the suffix {suffix!r}. Supported suffixes: {sorted(SUFFIXES)}.")
        if suffix == ".py" and not self.programs:
            raise ConfigValueError(
                f"{name} is a program that would be executed. Only data files are allowed here: {sorted(DATA_SUFFIXES)}."
            )
        bases = _Bases(replace(self, chain=(*self.chain, Path(name))), name, suffix)
        if suffix == ".py":
            file = read_python(
                text,
                name,
                bases.load,
                lazy=self.lazy,
                environment=self.environment,
                kept=self.kept,
                as_mmengine=self.as_mmengine,
            )
            environment, modules = file.environment, file.modules
            source = Source(name, file.data, text, suffix, environment=environment, modules=modules, uses=file.uses)
            bases.edit(file.base_edits, text)
        else:
            data, environment, uses = read_data(
                text, suffix, name, bases.load, environment=self.environment, kept=self.kept
            )
            source = Source(name, data, text, suffix, environment=environment, uses=uses)
            _refuse_imports(source)
        based_on = frozenset(layer.name for layer in bases.layers)
        return (*bases.layers, _without_deprecation(replace(source, based_on=based_on)))


def merge_layers(layers: Layers, *, as_mmengine: bool = False) -> dict[str, Any]:
    """Merge the layers; later layers override earlier ones.

    Args:
        layers: The layers, bases first.
        as_mmengine: Whether ``_delete_`` stays in a dict that replaces nothing.

    Raises:
        ConfigTypeError: if a dict would be merged into a value that is not a dict; the error includes the file.
        ConfigKeyError: if a list index is out of range.
    """
    data: dict[str, Any] = {}
    for layer in layers:
        try:
            data = merge(layer.data, data, list_keys=layer.list_keys, keep_unused_deletes=as_mmengine)
        except (ConfigTypeError, ConfigKeyError) as error:
            raise type(error)(f"{layer.name}: {error}") from error
    return data


@final
class _Bases:
    """The bases of one file. They are loaded as soon as the part of the file that names them has been read."""

    def __init__(self, reader: Reader, name: str, suffix: str) -> None:
        self.layers: Layers = ()
        self._reader = reader
        self._name = name
        self._suffix = suffix

    def load(self, wanted: Any) -> BaseValues:
        """Load the files in ``_base_`` or in the ``read_base`` block; return a function that returns their merged values."""
        bases = wanted if isinstance(wanted, list | tuple) else [wanted]
        if not all(isinstance(base, str | BaseImport) for base in bases):
            raise ConfigTypeError(f"{self._name}: {BASE} must be a path or a list of paths, got {wanted!r}.")
        loaded = [self._load_one(base) for base in bases]
        self._refuse_repeated(loaded)
        self.layers = _each_once(layer for layers in loaded for layer in layers)
        return functools.cache(lambda: merge_layers(self.layers, as_mmengine=self._reader.as_mmengine))

    def edit(self, edits: BaseEdits, text: str) -> None:
        """Apply the changes that the file with this ``text`` makes to the values of its bases."""
        if edits.removed:
            self.layers = tuple(replace(layer, data=_without(layer.data, edits.removed)) for layer in self.layers)
        if edits.changes:
            self.layers += (Source(self._name, edits.changes, text, Path(self._name).suffix, written_below=(BASE,)),)

    def _load_one(self, base: str | BaseImport) -> Layers:
        if isinstance(base, BaseImport):
            path = locate_base(base, self._name, _package_folder)
            return _select(self._reader.read_file(Path(os.path.normpath(path))), base, self._name)
        package, separator, inside = base.partition("::")
        if separator:
            layers = self._reader.read_file(self._in_package(package, inside))
            if self._suffix in DATA_SUFFIXES:
                # Registries import the package of a scope unless the scope comes from a data file.
                package = DataName(package)
            return tuple(replace(layer, data=_scoped(layer.data, package)) for layer in layers)
        return self._reader.read_file(self._beside(base))

    def _beside(self, base: str) -> Path:
        # normpath instead of resolve: errors show the paths as written, and relative paths from a symlinked folder work.
        folder = Path() if self._name.startswith("<") else Path(self._name).parent
        path = Path(os.path.normpath(folder / Path(base).expanduser()))
        if self._suffix in DATA_SUFFIXES:
            if path.suffix not in DATA_SUFFIXES:
                raise ConfigValueError(
                    f"{self._name} is a data file, and its base {base!r} is a program that would be executed. "
                    f"Write {self._name} in Python instead."
                )
            if not path.resolve().is_relative_to(self._reader.root.resolve()):
                raise ConfigValueError(
                    f"The base {base!r} of {self._name} is outside {self._reader.root.resolve()}. "
                    f"To allow it, pass a folder that contains both: Config.fromfile(path, root=folder)."
                )
        return path

    def _in_package(self, package: str, inside: str) -> Path:
        folder = _package_folder(package)
        for place in (folder / ".mim" / "configs", folder / "configs", folder):
            path = Path(os.path.normpath(place / inside))
            if path.is_file() and path.is_relative_to(folder):
                if self._suffix in DATA_SUFFIXES and path.suffix not in DATA_SUFFIXES:
                    raise ConfigValueError(
                        f"{self._name} is a data file, and its base {path} is a program that would be executed."
                    )
                return path
        raise ConfigFileError(f"{self._name}: the package {package} has no configuration {inside!r} in {folder}.")

    def _refuse_repeated(self, loaded: list[Layers]) -> None:
        given: dict[str, Layers] = {}
        for layers in loaded:
            for key in {key for layer in layers for key in layer.data}:
                # Two bases may have a common base, which sets the same keys in both.
                if key in given and not _give_alike(given[key], layers, key):
                    raise ConfigKeyError(
                        f"{self._name}: two bases set the key {key!r}: {_origin(given[key], key)} and "
                        f"{_origin(layers, key)}. Keep only one of them."
                    )
                given[key] = layers


def _each_once(layers: Iterable[Source]) -> Layers:
    return tuple({id(layer): layer for layer in layers}.values())


def _give_alike(these: Layers, those: Layers, key: str) -> bool:
    """Return whether the same files set a key to the same values in both sequences of layers."""
    one, other = ([layer for layer in layers if key in layer.data] for layers in (these, those))
    return len(one) == len(other) and all(
        first is second or (first.name == second.name and is_same(first.data[key], second.data[key]))
        for first, second in zip(one, other, strict=True)
    )


def _without(data: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in keys}


def _package_folder(package: str) -> Path:
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except ValueError:  # A module without a spec, such as __main__.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(f"The package {package!r}, which contains a base configuration, is not installed.")
    return Path(spec.submodule_search_locations[0])


def _select(layers: Layers, wanted: BaseImport, name: str) -> Layers:
    """Return the layers with only the imported keys, renamed to their aliases."""
    if wanted.names is None:
        return layers
    for key in wanted.names:
        if not any(key in layer.data for layer in layers):
            raise ConfigKeyError(f"{name}:{wanted.line}: {layers[-1].name} has no key {key!r}.")
    return tuple(
        replace(
            layer,
            data={alias: layer.data[key] for key, alias in wanted.names.items() if key in layer.data},
            uses=layer.uses.renamed(wanted.names),
        )
        for layer in layers
    )


def _scoped(data: Any, scope: str) -> Any:
    """Return data in which every outermost dict with a ``type`` has a ``_scope_``, which applies to the dicts inside as well."""
    if isinstance(data, dict):
        if "type" in data:
            return {"_scope_": scope, **data}
        return {key: _scoped(value, scope) for key, value in data.items()}
    return type(data)(_scoped(item, scope) for item in data) if type(data) in (list, tuple) else data


def _origin(layers: Layers, key: str) -> Origin:
    layer = next(layer for layer in reversed(layers) if key in layer.data)
    return Origin(layer.name, line_of(layer, (key,)))


def _refuse_imports(source: Source) -> None:
    if CUSTOM_IMPORTS in source.data:
        where = Origin(source.name, line_of(source, (CUSTOM_IMPORTS,)))
        raise ConfigParsingError(
            f"{where}: a data file cannot import modules. Remove {CUSTOM_IMPORTS}, or set it in a .py file."
        )


def _without_deprecation(source: Source) -> Source:
    """Warn if a file is deprecated: ``_deprecation_ = dict(expected=..., reference=...)``. Return it without that key."""
    notice = source.data.get(DEPRECATION)
    if notice is None:
        return source
    expected = notice.get("expected", "another file") if isinstance(notice, dict) else notice
    reference = f" See {notice['reference']}." if isinstance(notice, dict) and "reference" in notice else ""
    warnings.warn(f"{source.name} is deprecated; use {expected}.{reference}", DeprecationWarning, stacklevel=2)
    return replace(source, data=_without(source.data, {DEPRECATION}))
