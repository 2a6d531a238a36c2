"""The configuration that a run is made from."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, final

from stratagem.config.custom_imports import import_custom_modules
from stratagem.config.files import RESERVED_KEYS, Loaded, load_file, load_text, merged
from stratagem.config.history import Change, History
from stratagem.config.merge import merge, nest
from stratagem.config.node import ConfigDict, KeyPath
from stratagem.config.source import Origin, Source
from stratagem.config.text import python_text, text_of
from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigTypeError
from stratagem.utils.places import Placed

__all__ = ["Config"]


@final
class Config(MutableMapping[str, Any], Placed):
    """A mapping of sections, read from a file or made from a dict, that knows where each value was given.

    Keys are attributes too: ``config.model.depth``. A ``.py`` file is a program and runs when it is loaded; YAML, JSON
    and TOML files are data and never run code.

    Args:
        data: The sections; copied.
        filename: The file that ``data`` stands for.
    """

    # The instance's __dict__ is that of the ConfigDict inside, so that reading a key costs the same.
    __slots__ = ("__dict__", "_data", "_filename", "_history")

    _data: ConfigDict
    _filename: str | None
    _history: History

    def __init__(self, data: Mapping[str, Any] | None = None, filename: str | Path | None = None) -> None:
        if data is not None and not isinstance(data, Mapping):
            raise ConfigTypeError(f"Config is made from a mapping, not from {type(data).__name__} ({data!r}).")
        sections = dict(data or {})
        for key in RESERVED_KEYS.intersection(sections):
            raise ConfigKeyError(f"{key!r} is an attribute of every Config, so it cannot be a key. Rename it.")
        name = None if filename is None else str(filename)
        layers = (Source(name or "Config(...)", sections),) if sections else ()
        self._become(ConfigDict.placed(sections, history := History(layers)), history, name)

    @classmethod
    def fromfile(cls, filename: str | Path, *, import_custom_modules: bool = True) -> Config:
        """Read a ``.py``, ``.yaml``, ``.yml``, ``.json`` or ``.toml`` file with the files in its ``_base_``.

        A ``.py`` file is executed. Where it says ``custom_imports=dict(imports=["my_model"])``, those modules are
        imported, so that what they register is there; the folder of the file is put on ``sys.path`` for that and stays
        there, for worker processes that import the same modules when they unpickle. ``import_custom_modules=False``
        leaves both out.

        Raises:
            ConfigFileError: if a file cannot be read or is of another kind.
            ConfigParsingError: if a text is not valid, with its line.
        """
        path = Path(filename).expanduser()
        return cls._load(load_file(path), str(path), import_modules=import_custom_modules)

    @classmethod
    def fromstring(cls, text: str, suffix: str) -> Config:
        """Read a text in the language of a file with this suffix. Paths in it start from the working directory.

        Raises:
            ConfigFileError: if the suffix is not one that ``fromfile`` reads.
            ConfigParsingError: if the text is not valid, with its line.
        """
        return cls._load(load_text(text, suffix, "<string>"), None, import_modules=True)

    @classmethod
    def _load(cls, layers: Loaded, filename: str | None, *, import_modules: bool) -> Config:
        history = History(layers)
        config = cls.__new__(cls)
        config._become(ConfigDict.placed(merged(layers), history), history, filename)
        if import_modules:
            import_custom_modules(layers, config._data.get("custom_imports"))
        return config

    def _become(self, data: ConfigDict, history: History, filename: str | None) -> None:
        object.__setattr__(self, "_data", data)
        object.__setattr__(self, "_history", history)
        object.__setattr__(self, "_filename", filename)
        object.__setattr__(self, "__dict__", data.__dict__)

    @property
    def filename(self) -> str | None:
        """The file that was loaded; None where there was none."""
        return self._filename

    @property
    def text(self) -> str:
        """The text of the files, those of bases first."""
        return "\n".join(f"{layer.name}\n{layer.text}" for layer in self._history.layers if layer.text)

    @property
    def pretty_text(self) -> str:
        """The configuration as Python, with everything merged."""
        return python_text(self._data)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in RESERVED_KEYS:
            raise ConfigKeyError(f"{key!r} is an attribute of every Config, so it cannot be a key. Rename it.")
        self._data[key] = value

    def __delitem__(self, key: str) -> None:
        del self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._data[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

    def __dir__(self) -> Iterator[str]:
        yield from super().__dir__()
        yield from self

    def __repr__(self) -> str:
        return f"Config({self.to_dict()!r}, filename={self._filename!r})"

    def __place__(self, key: str | None = None) -> str:
        return self._data.__place__(key)

    def __copy__(self) -> Config:
        return self._with(self._data.copy())

    def copy(self) -> Config:
        """Return a shallow copy; nested dicts are shared."""
        return copy.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return self._with(copy.deepcopy(self._data, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _revive, (self._data, self._history, self._filename)

    def _with(self, data: ConfigDict) -> Config:
        return _revive(data, History(self._history.layers), self._filename)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain dicts, lists and tuples, all of them copies."""
        return self._data.to_dict()

    def merge_from_dict(
        self, options: Mapping[str, Any], *, allow_list_keys: bool = True, source: str = "--set"
    ) -> None:
        """Lay values over this configuration, in place: ``{"model.layers.0.depth": 3}``.

        Args:
            options: Values by dotted keys; a dict as value is merged, key by key.
            allow_list_keys: A key of digits means an item of a list.
            source: What ``where`` and errors call the origin of these values.

        Raises:
            ConfigKeyError: if an index is outside of its list.
            ConfigTypeError: if a key lies below a value that has no keys.
        """
        layer = Source(source, nest(options), list_keys=allow_list_keys)
        for key in RESERVED_KEYS & layer.data.keys():
            raise ConfigKeyError(f"{key!r} is an attribute of every Config, so it cannot be a key. Rename it.")
        history = History((*self._history.layers, layer))
        data = merge(layer.data, self._data.to_dict(), list_keys=allow_list_keys)
        self._become(ConfigDict.placed(data, history), history, self._filename)

    def dump(self, path: str | Path | None = None) -> str:
        """Write the merged configuration to a file, in the language that its suffix names, and return the text.

        Without a path the text is in the language of the file that was loaded, else in Python.

        Raises:
            ConfigFileError: if the suffix is unknown or the file cannot be written.
            ConfigValueError: if a value cannot be said in that language.
        """
        suffix = Path(path if path is not None else self._filename or "config.py").suffix
        text = text_of(self._data, suffix)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigFileError(f"{path} cannot be written: {error.strerror or error}.") from error
        return text

    def where(self, path: str) -> Origin | None:
        """Return which file and line, or which override, gave the value at a dotted path; None where nothing did."""
        return self._history.origin(_key_path(path))

    def explain(self, path: str) -> list[Change]:
        """Return what gave, changed or removed the value at a dotted path, in the order in which it happened."""
        return self._history.changes(_key_path(path))

    @staticmethod
    def diff(first: Config | str | Path, second: Config | str | Path) -> str:
        """Return the lines that differ between two configurations, each given as it is or as a file; empty if none."""
        old, new = (item if isinstance(item, Config) else Config.fromfile(item) for item in (first, second))
        lines = difflib.unified_diff(
            old.pretty_text.splitlines(),
            new.pretty_text.splitlines(),
            str(old.filename or "first"),
            str(new.filename or "second"),
            lineterm="",
        )
        return "\n".join(lines)


def _key_path(path: str) -> KeyPath:
    return tuple(int(key) if key.isdigit() else key for key in path.split("."))


def _revive(data: ConfigDict, history: History, filename: str | None) -> Config:
    config = Config.__new__(Config)
    config._become(data, history, filename)
    return config
