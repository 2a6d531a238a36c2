"""Load a configuration file with its bases, and import the modules that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from stratagem.config.reading.custom_imports import (
    CUSTOM_IMPORTS,
    add_sibling_folders_to_path,
    import_custom_modules,
)
from stratagem.config.reading.files import Layers, Reader, merge_layers

__all__ = ["Loaded", "default_root", "merge_and_import"]


@final
@dataclass(frozen=True, slots=True)
class Loaded:
    """A configuration that was read: its files and overrides, bases first, and the merged values."""

    layers: Layers
    values: dict[str, Any]

    @property
    def text(self) -> str:
        """The contents of the files that were read, bases first."""
        return "\n".join(f"{layer.name}\n{layer.text}" for layer in self.layers if layer.text)

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that placeholders read, with their values at that time."""
        return {name: value for layer in self.layers for name, value in layer.environment.items()}


def default_root(path: Path) -> Path:
    """Return the folder that must contain the bases of a data file by default."""
    here = Path.cwd()
    return here if path.resolve().is_relative_to(here) else path.parent


def merge_and_import(reader: Reader, layers: Layers, *, import_modules: bool) -> Loaded:
    """Merge the layers that a reader has read, and import the modules in ``custom_imports``."""
    values = merge_layers(layers, as_mmengine=reader.as_mmengine)
    add_sibling_folders_to_path(layers)
    if import_modules:
        import_custom_modules(layers, values.get(CUSTOM_IMPORTS))
    return Loaded(layers, values)
