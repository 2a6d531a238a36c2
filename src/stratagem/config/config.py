"""The configuration that a run is made from."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, final

from stratagem.config.history import Change, History
from stratagem.config.keys import KeyPath, parse_path
from stratagem.config.merge import merge, nest
from stratagem.config.node import ConfigDict, as_plain
from stratagem.config.reading.custom_imports import add_sibling_folders_to_path, import_custom_modules
from stratagem.config.reading.data_languages import DATA_SUFFIXES
from stratagem.config.reading.files import Layers, Reader, merge_layers
from stratagem.config.reading.source import Origin, Source
from stratagem.config.redact import redacted
from stratagem.config.text import python_text, text_of
from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigTypeError
from stratagem.utils.source_positions import HasSourcePosition

__all__ = ["Config"]


@final
class Config(MutableMapping[str, Any], HasSourcePosition):
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
        name = None if filename is None else str(filename)
        sections = as_plain(data._data if isinstance(data, Config) else dict(data or {}))
        layers = (Source(name or "Config(...)", sections),) if sections else ()
        self._become(sections, layers, name)

    @classmethod
    def fromfile(
        cls,
        filename: str | Path,
        *,
        import_custom_modules: bool = True,
        use_environment_variables: bool = True,
        lazy_import: bool | None = None,
        root: str | Path | None = None,
    ) -> Config:
        """Read a ``.py``, ``.yaml``, ``.yml``, ``.json`` or ``.toml`` file with the files that it is based on.

        A ``.py`` file is executed. Where it says ``custom_imports=dict(imports=["my_model"])``, those modules are
        imported, so that what they register is there; the folder of the file is put first on ``sys.path`` for that and
        stays there, for worker processes that import the same modules when they unpickle.

        The other files are data: they never run code, cannot be based on a ``.py`` file or on a file outside of
        ``root``, and what they name as ``type`` is a registered name or is in a package that the program allowed
        (``stratagem.registry.allow_packages``). They give only listed arguments to what loads models, compiles or
        connects. That applies to each value of a data file, also if a Python file is based on it. SECURITY.md lists
        what a data file can reach.

        Args:
            filename: The file.
            import_custom_modules: Do what ``custom_imports`` says.
            use_environment_variables: Let placeholders read environment variables; without it they are refused.
            lazy_import: Whether a Python file is a pure-Python configuration, whose imports only name things. None to
                find out: it has ``with read_base():``, or imports what Python does not bring and has no ``_base_``.
            root: The folder that the bases of data files must lie in. The working directory by default if the file
                lies in it, else the folder of the file.

        Raises:
            ConfigFileError: if a file cannot be read or is of another kind.
            ConfigParsingError: if a text is not valid, with its line.
            ConfigKeyError: if two bases give the same key, or an environment variable is needed and not set.
            ConfigTypeError: if a dict is laid on something that is none.
            ConfigValueError: if a data file is based on what it must not reach.
        """
        path = Path(filename).expanduser()
        reader = Reader(Path(root) if root else _default_root(path), lazy_import, use_environment_variables)
        return cls._load(reader.read_file(path), str(path), import_modules=import_custom_modules)

    @classmethod
    def fromdata(cls, filename: str | Path, *, root: str | Path | None = None) -> Config:
        """Read a YAML, JSON or TOML file that someone else wrote, such as one of an archive or a hub.

        A ``.py`` file is refused, since it would run, and so are placeholders for environment variables, whose values
        would end up in logs. Its bases lie in ``root``, by default the file's own folder.

        Raises:
            ConfigError: in one of its kinds, as ``fromfile`` does.
        """
        path = Path(filename).expanduser()
        reader = Reader(Path(root) if root else path.parent, environment=False, programs=False)
        return cls._load(reader.read_file(path), str(path), import_modules=False)

    @classmethod
    def fromstring(cls, text: str, suffix: str) -> Config:
        """Read a text in the language of a file with this suffix. Paths in it start from the working directory.

        Raises:
            ConfigFileError: if the suffix is not one that ``fromfile`` reads.
            ConfigParsingError: if the text is not valid, with its line.
        """
        return cls._load(Reader(Path()).read_text(text, suffix, "<string>"), None, import_modules=True)

    @classmethod
    def _load(cls, layers: Layers, filename: str | None, *, import_modules: bool) -> Config:
        config = cls.__new__(cls)
        config._become(merge_layers(layers), layers, filename)
        add_sibling_folders_to_path(layers)
        if import_modules:
            import_custom_modules(layers, config._data.get("custom_imports"))
        return config

    def _become(self, sections: Mapping[str, Any], layers: Layers, filename: str | None) -> None:
        history = History(layers)
        for key in _RESERVED.intersection(sections):
            raise ConfigKeyError(f"{history.position((key,))}: every Config has an attribute {key!r}. Rename the key.")
        self._adopt(ConfigDict.with_positions(sections, history), history, filename)

    def _adopt(self, data: ConfigDict, history: History, filename: str | None) -> None:
        object.__setattr__(self, "_data", data)
        object.__setattr__(self, "_history", history)
        object.__setattr__(self, "_filename", filename)
        object.__setattr__(self, "__dict__", data.__dict__)

    @property
    def filename(self) -> str | None:
        """The file that was loaded; None where there was none."""
        return self._filename

    @property
    def is_data(self) -> bool:
        """Whether all files that it was read from are data, so that a dump of it should be one too, not a program."""
        suffixes = {layer.suffix for layer in self._history.layers if layer.suffix}
        return bool(suffixes) and suffixes <= DATA_SUFFIXES

    @property
    def text(self) -> str:
        """The text of the files, those of bases first."""
        return "\n".join(f"{layer.name}\n{layer.text}" for layer in self._history.layers if layer.text)

    @property
    def env_variables(self) -> dict[str, str]:
        """The environment variables that placeholders used, with the values that they had."""
        return {name: value for layer in self._history.layers for name, value in layer.environment.items()}

    @property
    def pretty_text(self) -> str:
        """The configuration as Python, with everything merged; placeholders and secrets as in :meth:`dump`."""
        return python_text(redacted(self.to_dict()))

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in _RESERVED:
            raise ConfigKeyError(f"Every Config has an attribute {key!r}. Choose another key.")
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
        return f"Config({redacted(self.to_dict())!r}, filename={self._filename!r})"

    def __source_position__(self, key: str | None = None) -> str:
        return self._data.__source_position__(key)

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
        return _revive(data, self._history, self._filename)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain dicts, lists and tuples, all of them copies; lazy objects as their dotted names."""
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
        sections = merge(layer.data, as_plain(self._data), list_keys=allow_list_keys)
        self._become(sections, (*self._history.layers, layer), self._filename)

    def dump(self, path: str | Path | None = None) -> str:
        """Write the merged configuration to a file, in the language that its suffix names, and return the text.

        Without a path the text is in the language of the file that was loaded, else in Python. Strings that placeholders
        filled are written as the placeholders. Strings under the name of a secret, user information and signatures of URLs are
        written as ``{{ $SECRET:<path> }}``: that loads, and fails when it is used. ``to_dict`` returns the values themselves.

        Raises:
            ConfigFileError: if the suffix is unknown or the file cannot be written.
            ConfigValueError: if a value cannot be said in that language.
        """
        suffix = Path(path if path is not None else self._filename or "config.py").suffix
        text = text_of(redacted(self.to_dict()), suffix)
        if path is not None:
            try:
                Path(path).write_text(text, encoding="utf-8")
            except OSError as error:
                raise ConfigFileError(f"{path} cannot be written: {error.strerror or error}.") from error
        return text

    def where(self, path: str) -> Origin | None:
        """Return which file and line, or which override, gave the value at a dotted path; None if there is no value.

        A dict was given where it was first written, or replaced as a whole; what was merged into it later has origins
        of its own.
        """
        keys = parse_path(path)
        value = _at(self._data, keys)
        if value is _MISSING:
            return None
        change = self._history.last(keys)
        if change is None or not _same(value, change.value):
            return Origin("the program")
        return change.origin

    def explain(self, path: str) -> list[Change]:
        """Return what gave, changed or removed the value at a dotted path, in the order in which it happened."""
        return self._history.changes(parse_path(path))

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


# Attributes that a key of the same name would hide.
_RESERVED = frozenset(dir(Config))
_MISSING = object()


def _at(node: Any, keys: KeyPath) -> Any:
    for key in keys:
        if isinstance(node, ConfigDict):
            node = dict(node.raw_items()).get(str(key), _MISSING)
        elif isinstance(node, list | tuple) and isinstance(key, int) and key < len(node):
            node = node[key]
        else:
            return _MISSING
    return node


def _same(value: Any, given: Any) -> bool:
    """Tell whether a value is still what a layer gave; dicts always count as that, since other layers add to them."""
    if isinstance(value, dict):
        return isinstance(given, Mapping)
    if isinstance(value, list | tuple):
        return (
            isinstance(given, list | tuple)
            and len(value) == len(given)
            and all(_same(item, was) for item, was in zip(value, given, strict=True))
        )
    return value is given or (isinstance(value, str | int | float) and type(value) is type(given) and value == given)


def _default_root(path: Path) -> Path:
    here = Path.cwd()
    return here if path.resolve().is_relative_to(here) else path.parent


def _revive(data: ConfigDict, history: History, filename: str | None) -> Config:
    config = Config.__new__(Config)
    config._adopt(data, history, filename)
    return config
