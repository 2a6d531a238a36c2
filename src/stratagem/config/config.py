"""The configuration of a run."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, final

from stratagem.config.history import Change, History
from stratagem.config.keys import KeyPath, parse_path
from stratagem.config.merge import merge, nest
from stratagem.config.node import ConfigDict, as_plain
from stratagem.config.reading.data_languages import DATA_SUFFIXES
from stratagem.config.reading.files import Layers, Reader
from stratagem.config.reading.loading import Loaded, default_root, merge_and_import
from stratagem.config.reading.source import Origin, Source
from stratagem.config.redact import redacted
from stratagem.config.text import python_text, text_of
from stratagem.errors import ConfigFileError, ConfigKeyError, ConfigTypeError
from stratagem.utils.source_positions import HasSourcePosition

__all__ = ["Config"]


@final
class Config(MutableMapping[str, Any], HasSourcePosition):
    """A configuration, read from a file or created from a dict, that records where each value was set.

    Keys are available as attributes: ``config.model.depth``. A ``.py`` file is a program that is executed when it is
    loaded; YAML, JSON and TOML files are data and never execute code.

    Args:
        data: The sections; they are copied.
        filename: The file that ``data`` was read from.
    """

    # The instance shares its __dict__ with the ConfigDict, so that attribute access is as fast as on a ConfigDict.
    __slots__ = ("__dict__", "_data", "_filename", "_history")

    _data: ConfigDict
    _filename: str | None
    _history: History

    def __init__(self, data: Mapping[str, Any] | None = None, filename: str | Path | None = None) -> None:
        if data is not None and not isinstance(data, Mapping):
            raise ConfigTypeError(f"Config expects a mapping, got {type(data).__name__} ({data!r}).")
        name = None if filename is None else str(filename)
        sections = as_plain(data._data if isinstance(data, Config) else dict(data or {}))
        layers = (Source(name or "Config(...)", sections),) if sections else ()
        self._set_sections(sections, layers, name)

    @classmethod
    def fromfile(
        cls,
        filename: str | Path,
        *,
        import_custom_modules: bool = True,
        use_environment_variables: bool = True,
        lazy_import: bool | None = None,
        root: str | Path | None = None,
        keep_placeholders: Collection[str] = (),
    ) -> Config:
        """Read a ``.py``, ``.yaml``, ``.yml``, ``.json`` or ``.toml`` file and the base files that it names.

        A ``.py`` file is executed. If it contains ``custom_imports=dict(imports=["my_model"])``, these modules are imported
        so that they register their classes. For this purpose, the file's folder is put first on ``sys.path``. It stays
        there, because worker processes import the same modules when they unpickle objects.

        The other files are data: they never execute code and cannot have a ``.py`` file or a file outside ``root`` as a
        base. A ``type`` in them must be a registered name or belong to a package that the program allows with
        :func:`stratagem.registry.allow_packages`. For targets that load models, compile code or open connections, they can
        set only listed arguments. The same holds for values of a data file that is the base of a Python file. SECURITY.md
        lists what a data file can do.

        Args:
            filename: The file to read.
            import_custom_modules: Whether to import the modules in ``custom_imports``.
            use_environment_variables: Whether placeholders may read environment variables; if False, such placeholders
                raise an error.
            lazy_import: Whether a Python file is a pure-Python configuration, in which imported names are not imported until
                they are used. If None, files that contain ``with read_base():``, and files that import third-party
                modules and have no ``_base_``, are treated as pure-Python configurations.
            root: The folder that must contain the bases of data files. Defaults to the working directory if it contains the
                file, otherwise to the folder of the file.
            keep_placeholders: The kinds of placeholders that are not replaced: ``"file"`` for ``{{ fileDirname }}`` and similar
                ones, ``"variable"`` for environment variables.

        Raises:
            ConfigFileError: if a file cannot be read or has an unknown suffix.
            ConfigParsingError: if a file is invalid; the error includes the line.
            ConfigKeyError: if two bases set the same key, or a required environment variable is not set.
            ConfigTypeError: if a dict is merged into a value that is not a dict.
            ConfigValueError: if a data file has a base that is not allowed.
        """
        path = Path(filename).expanduser()
        top = Path(root) if root else default_root(path)
        reader = Reader(top, lazy_import, use_environment_variables, kept=keep_placeholders)
        loaded = merge_and_import(reader, reader.read_file(path), import_modules=import_custom_modules)
        return cls._of(loaded, str(path))

    @classmethod
    def fromdata(cls, filename: str | Path, *, root: str | Path | None = None) -> Config:
        """Read an untrusted YAML, JSON or TOML file, such as one from an archive or a model hub.

        A ``.py`` file raises an error, since it would be executed. Placeholders for environment variables also raise an
        error, since their values could appear in logs. The bases must be in ``root``, which defaults to the folder of
        the file.

        Raises:
            ConfigError: as in :meth:`fromfile`.
        """
        path = Path(filename).expanduser()
        reader = Reader(Path(root) if root else path.parent, environment=False, programs=False)
        return cls._of(merge_and_import(reader, reader.read_file(path), import_modules=False), str(path))

    @classmethod
    def fromstring(cls, text: str, suffix: str) -> Config:
        """Read a string in the language of ``suffix``. Paths in it are relative to the working directory.

        Raises:
            ConfigFileError: if the suffix is not one that :meth:`fromfile` reads.
            ConfigParsingError: if the text is invalid; the error includes the line.
        """
        reader = Reader(Path())
        return cls._of(merge_and_import(reader, reader.read_text(text, suffix, "<string>"), import_modules=True), None)

    @classmethod
    def _of(cls, loaded: Loaded, filename: str | None) -> Config:
        config = cls.__new__(cls)
        config._set_sections(loaded.values, loaded.layers, filename)
        return config

    def _set_sections(self, sections: Mapping[str, Any], layers: Layers, filename: str | None) -> None:
        history = History(layers)
        for key in _RESERVED.intersection(sections):
            raise ConfigKeyError(
                f"{history.position((key,))}: {key!r} is the name of an attribute of Config. Rename the key."
            )
        self._set_fields(ConfigDict.with_positions(sections, history), history, filename)

    def _set_fields(self, data: ConfigDict, history: History, filename: str | None) -> None:
        object.__setattr__(self, "_data", data)
        object.__setattr__(self, "_history", history)
        object.__setattr__(self, "_filename", filename)
        object.__setattr__(self, "__dict__", data.__dict__)

    @property
    def filename(self) -> str | None:
        """The file that was loaded; None if there is none."""
        return self._filename

    @property
    def is_data(self) -> bool:
        """Whether all files that were read are data files; if so, dump the configuration as data, not as a program."""
        suffixes = {layer.suffix for layer in self._history.layers if layer.suffix}
        return bool(suffixes) and suffixes <= DATA_SUFFIXES

    @property
    def file_layers(self) -> Layers:
        """The files and overrides that were merged, bases first."""
        return self._history.layers

    @property
    def text(self) -> str:
        """The contents of the files that were read, bases first."""
        return Loaded(self._history.layers, {}).text

    @property
    def env_variables(self) -> dict[str, str]:
        """The environment variables that placeholders read, with their values at that time."""
        return Loaded(self._history.layers, {}).environment

    @property
    def pretty_text(self) -> str:
        """The merged configuration as Python; placeholders and secrets are written as in :meth:`dump`."""
        return python_text(redacted(self.to_dict()), mark_unsupported=True)

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in _RESERVED:
            raise ConfigKeyError(f"{key!r} is the name of an attribute of Config. Choose another key.")
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
        return _rebuild, (self._data, self._history, self._filename)

    def _with(self, data: ConfigDict) -> Config:
        return _rebuild(data, self._history, self._filename)

    def to_dict(self) -> dict[str, Any]:
        """Return a deep copy made of plain dicts, lists and tuples, with lazy objects as dotted names."""
        return self._data.to_dict()

    def merge_from_dict(
        self, options: Mapping[str, Any], *, allow_list_keys: bool = True, source: str = "--set"
    ) -> None:
        """Merge values into this configuration, in place, such as ``{"model.layers.0.depth": 3}``.

        Args:
            options: Values by dotted key. A dict is merged key by key.
            allow_list_keys: Whether a numeric key selects a list item.
            source: The origin of these values, as reported by ``where`` and in errors.

        Raises:
            ConfigKeyError: if a list index is out of range.
            ConfigTypeError: if a key is set in a value that is not a dict.
        """
        layer = Source(source, nest(options), list_keys=allow_list_keys)
        sections = merge(layer.data, as_plain(self._data), list_keys=allow_list_keys)
        self._set_sections(sections, (*self._history.layers, layer), self._filename)

    def dump(self, path: str | Path | None = None) -> str:
        """Write the merged configuration to a file, in the language of its suffix, and return the text.

        Without a path, the text is in the language of the file that was loaded, or in Python if there is none. Interpolated
        strings are written with their placeholders. Secrets, which are recognized by their keys, and credentials and
        signatures in URLs are written as ``{{ $SECRET:<path> }}``, which can be loaded but raises an error when it is used.
        :meth:`to_dict` returns the actual values.

        Raises:
            ConfigFileError: if the suffix is unknown or the file cannot be written.
            ConfigValueError: if the language cannot represent a value, such as a lambda; the error names its key.
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
        """Return the file and line, or the override, that set the value at a dotted path; None if there is no value.

        The origin of a dict is where it was first set or last replaced. Values that were merged into it later have their own
        origins.
        """
        keys = parse_path(path)
        value = _at(self._data, keys)
        if value is _MISSING:
            return None
        change = self._history.last(keys)
        if change is None or not _is_unchanged(value, change.value):
            return Origin("the program")
        return change.origin

    def explain(self, path: str) -> list[Change]:
        """Return the changes that set, replaced or removed the value at a dotted path, in order."""
        return self._history.changes(parse_path(path))

    @staticmethod
    def diff(first: Config | str | Path, second: Config | str | Path) -> str:
        """Return a unified diff of two configurations, each given as a ``Config`` or a file; empty if they are equal."""
        old, new = (item if isinstance(item, Config) else Config.fromfile(item) for item in (first, second))
        lines = difflib.unified_diff(
            old.pretty_text.splitlines(),
            new.pretty_text.splitlines(),
            str(old.filename or "first"),
            str(new.filename or "second"),
            lineterm="",
        )
        return "\n".join(lines)


# Attributes that a key with the same name would shadow.
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


def _is_unchanged(value: Any, given: Any) -> bool:
    """Return whether a value is still the one that a layer set; True for dicts, since later layers merge into them."""
    if isinstance(value, dict):
        return isinstance(given, Mapping)
    if isinstance(value, list | tuple):
        return (
            isinstance(given, list | tuple)
            and len(value) == len(given)
            and all(_is_unchanged(item, was) for item, was in zip(value, given, strict=True))
        )
    return value is given or (isinstance(value, str | int | float) and type(value) is type(given) and value == given)


def _rebuild(data: ConfigDict, history: History, filename: str | None) -> Config:
    config = Config.__new__(Config)
    config._set_fields(data, history, filename)
    return config
