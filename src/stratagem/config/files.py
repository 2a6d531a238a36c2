"""Read a configuration file with everything that it is based on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from stratagem.config.data_files import parse_data
from stratagem.config.lines import line_of
from stratagem.config.merge import merge
from stratagem.config.python_files import parse_python
from stratagem.config.source import DATA_SUFFIXES, Source
from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigParsingError, ConfigTypeError

__all__ = ["RESERVED_KEYS", "Loaded", "load_file", "load_text", "merged"]

BASE = "_base_"
SUFFIXES = DATA_SUFFIXES | {".py"}
# Attributes of a Config that would hide a key of this name.
RESERVED_KEYS = frozenset({"filename", "text", "pretty_text", "env_variables"})

Loaded = tuple[Source, ...]


def load_file(path: Path, *, below: tuple[Path, ...] = ()) -> Loaded:
    """Return the layers of a file, those of its bases first. ``below`` are the files that led here.

    Raises:
        ConfigFileError: if a file cannot be read, or is of another kind than .py, .yaml, .yml, .json, .toml.
        ConfigParsingError: if a text is not valid, or files are based on each other in a circle.
        ConfigKeyError: if two bases of a file give the same key.
    """
    if path in below:
        circle = " -> ".join(map(str, (*below[below.index(path) :], path)))
        raise ConfigParsingError(f"Configuration files are based on each other in a circle: {circle}.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigParsingError(f"{path} is not a text in UTF-8.") from error
    except OSError as error:
        led = f" It is a base of {below[-1]}." if below else ""
        raise ConfigFileError(f"{path} cannot be read: {error.strerror or error}.{led}") from error
    return load_text(text, path.suffix, str(path), below=below)


def load_text(text: str, suffix: str, name: str, *, below: tuple[Path, ...] = ()) -> Loaded:
    """Return the layers of a text in the language of ``suffix``; ``name`` stands for it in errors."""
    if suffix not in SUFFIXES:
        raise ConfigFileError(
            f"{name} has the suffix {suffix!r}; a configuration is one of {', '.join(sorted(SUFFIXES))}."
        )
    data = parse_python(text, name) if suffix == ".py" else parse_data(text, suffix, name)
    source = Source(name, {key: value for key, value in data.items() if key != BASE}, text, suffix)
    _refuse_reserved(source)
    layers = _load_bases(data.get(BASE, ()), source, below)
    return (*layers, source)


def merged(layers: Loaded) -> dict[str, Any]:
    """Return what the layers say together, the last one above all others."""
    data: dict[str, Any] = {}
    for layer in layers:
        try:
            data = merge(layer.data, data, list_keys=layer.list_keys)
        except (ConfigTypeError, ConfigKeyError) as error:
            raise type(error)(f"{layer.name}: {error}") from error
    return data


def _load_bases(bases: object, source: Source, below: tuple[Path, ...]) -> Loaded:
    paths = [bases] if isinstance(bases, str) else bases
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
        raise ConfigTypeError(f"{source.name}: {BASE} must be a path or a list of paths, not {bases!r}.")
    layers: list[Source] = []
    given: dict[str, Loaded] = {}
    for base in paths:
        loaded = load_file(_locate(base, source), below=(*below, Path(source.name)))
        for key in merged(loaded):
            if key in given:
                raise ConfigKeyError(
                    f"{source.name}: two bases give the key {key!r}: "
                    f"{_where(given[key], key)} and {_where(loaded, key)}. Keep it in one of them."
                )
            given[key] = loaded
        layers.extend(loaded)
    return tuple(layers)


def _locate(base: str, source: Source) -> Path:
    # normpath and not resolve: errors show the names that people wrote, and a linked folder keeps its neighbours.
    return Path(os.path.normpath(source.folder / Path(base).expanduser()))


def _where(layers: Loaded, key: str) -> str:
    layer = next(layer for layer in reversed(layers) if key in layer.data)
    line = line_of(layer, (key,))
    return layer.name if line is None else f"{layer.name}:{line}"


def _refuse_reserved(source: Source) -> None:
    for key in RESERVED_KEYS & source.data.keys():
        raise ConfigKeyError(
            f"{source.name}: {key!r} is an attribute of every Config, so it cannot be a key. Rename it."
        )
