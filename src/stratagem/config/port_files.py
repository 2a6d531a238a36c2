"""Rewrite a configuration of MMEngine's Runner together with its bases."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import final

from stratagem.config.config import Config
from stratagem.config.port import PORTED_KEYS, Ported, port
from stratagem.errors import ConfigError, ConfigFileError, ConfigValueError
from stratagem.utils import absolute

__all__ = ["PortedFile", "port_files", "verify", "write_file", "write_files"]


@final
@dataclass(frozen=True, slots=True)
class PortedFile:
    """One of the files of a configuration, rewritten.

    Attributes:
        source: the original file.
        place: the path relative to the folder that contains the configuration and its bases.
        ported: the new text, and what must be changed by hand.
    """

    source: Path
    place: Path
    ported: Ported


def port_files(path: Path) -> list[PortedFile]:
    """Rewrite a configuration and the Python files that are its bases, directly or indirectly. The configuration comes first.

    Paths of bases stay valid if the files are written with the same structure. Bases in installed packages
    (``"package::file"``) are not rewritten, and data files are not changed; both have a note.

    Raises:
        ConfigFileError: if a file cannot be read.
        ConfigParsingError: if a file is not a valid Python configuration.
    """
    main = port(_read(path), str(path))
    if not ("_base_" in main.text or "read_base" in main.text):
        return [PortedFile(path, Path(path.name), main)]
    sources = _sources(path, main.notes)
    root = Path(os.path.commonpath([each.parent for each in sources]))
    return [
        PortedFile(each, each.relative_to(root), main if index == 0 else _port_base(each))
        for index, each in enumerate(sources)
    ]


def write_files(files: list[PortedFile], folder: Path) -> list[Path]:
    """Write the files into a folder, with the structure of the originals; return their paths.

    Raises:
        ConfigValueError: if an original would be overwritten.
        ConfigFileError: if a file cannot be written.
    """
    paths = [folder / each.place for each in files]
    for each, path in zip(files, paths, strict=True):
        if path.exists() and path.samefile(each.source):
            raise ConfigValueError(f"--out {folder} would overwrite {each.source}. Choose another folder.")
    for each, path in zip(files, paths, strict=True):
        write_file(path, each.ported.text)
    return paths


def write_file(path: Path, text: str) -> None:
    """Write a file, and create its folder if it is missing.

    Raises:
        ConfigFileError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigFileError(f"{error.filename} cannot be written: {error.strerror}.") from error


def verify(original: Path, new: Path) -> Iterator[str]:
    """Load both configurations; yield a note for each difference that rewriting should not have made."""
    before = Config.fromfile(original, import_custom_modules=False).to_dict()
    try:
        after = Config.fromfile(new, import_custom_modules=False).to_dict()
    except ConfigError as error:
        yield f"{new} does not load: {error}"
        return
    for key in [key for key in before if key not in PORTED_KEYS]:
        if key not in after:
            yield f"{new}: {key} is missing."
        elif before[key] != after[key]:
            yield f"{new}: {key} is {after[key]!r}, and in {original} {before[key]!r}."


def _sources(path: Path, notes: list[str]) -> list[Path]:
    """Return the configuration and its bases, and add notes about the bases that are not rewritten."""
    layers = Config.fromfile(path, import_custom_modules=False).file_layers
    packages = sorted({name for each in layers for name in _packages(each.text)})
    if packages:
        notes.append(
            f"{path}: bases in installed packages ({', '.join(f'{name}::' for name in packages)}) were not rewritten. To rewrite "
            "them as well, copy them to a folder of this configuration."
        )
    folders = [Path(spec.origin).parent for name in packages if (spec := find_spec(name)) is not None and spec.origin]
    own = absolute(path)
    found = [each for each in map(absolute, dict.fromkeys(layer.name for layer in layers)) if each != own]
    return [own, *(each for each in found if not any(each.is_relative_to(folder) for folder in folders))]


def _packages(text: str) -> Iterator[str]:
    for line in text.splitlines():
        for quote in "'\"":
            for part in line.split(quote)[1::2]:
                package, separator, _ = part.partition("::")
                if separator and package.isidentifier():
                    yield package


def _port_base(path: Path) -> Ported:
    text = _read(path)
    if path.suffix == ".py":
        return port(text, str(path))
    return Ported(text, [f"{path} is not a Python file; it was copied without changes."])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigFileError(f"{error.filename} cannot be read: {error.strerror}.") from error
