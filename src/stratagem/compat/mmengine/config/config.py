"""The configuration class of MMEngine, read and written by :class:`stratagem.config.Config`."""

from __future__ import annotations

import copy
import difflib
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stratagem.compat.mmengine.config.config_dict import ConfigDict
from stratagem.compat.mmengine.config.dict_action import DictAction
from stratagem.compat.mmengine.fileio import dump
from stratagem.config import read_base
from stratagem.config.history import History
from stratagem.config.merge import merge, nest
from stratagem.config.node import as_plain
from stratagem.config.reading.files import Reader
from stratagem.config.reading.loading import Loaded, default_root, merge_and_import
from stratagem.config.reading.source import Source
from stratagem.config.redact import redacted
from stratagem.config.text import text_of
from stratagem.errors import ConfigKeyError

__all__ = ["Config", "ConfigDict", "DictAction", "read_base"]

RESERVED_KEYS = ("filename", "text", "pretty_text", "env_variables")


class Config:
    """A configuration with the interface of ``mmengine.Config``.

    Args:
        cfg_dict: the values.
        cfg_text: the text of the files; by default, that of ``filename``.
        filename: the file that the values come from.
        env_variables: the environment variables that the files use.
        format_python_code: has no effect, since the text is always formatted.

    Raises:
        TypeError: if ``cfg_dict`` is not a dict.
        ConfigKeyError: if a top-level key is the name of an attribute: filename, text, pretty_text or env_variables.
    """

    _cfg_dict: ConfigDict
    _filename: str | None
    _text: str
    _env_variables: dict[str, Any]
    _format_python_code: bool
    _imported_names: set[str]
    _layers: tuple[Source, ...]

    def __init__(
        self,
        cfg_dict: dict[str, Any] | None = None,
        cfg_text: str | None = None,
        filename: str | Path | None = None,
        env_variables: dict[str, Any] | None = None,
        format_python_code: bool = True,
    ) -> None:
        if cfg_dict is not None and not isinstance(cfg_dict, dict):
            raise TypeError(f"cfg_dict must be a dict, got {type(cfg_dict).__name__}.")
        name = None if filename is None else str(filename)
        text = cfg_text or (Path(name).read_text(encoding="utf-8") if name else "")
        data = cfg_dict if isinstance(cfg_dict, ConfigDict) else ConfigDict(cfg_dict or {})
        self._set(data, name, text, env_variables or {}, format_python_code, set(), ())

    def _set(
        self,
        data: ConfigDict,
        filename: str | None,
        text: str,
        env_variables: dict[str, Any],
        format_python_code: bool,
        imported_names: set[str],
        layers: tuple[Source, ...],
    ) -> None:
        for key in RESERVED_KEYS:
            if key in data:
                where = History(layers).position((key,))
                raise ConfigKeyError(f"{where}: {key} is reserved for config file attributes. Rename the key.")
        fields = {
            "_cfg_dict": data,
            "_filename": filename,
            "_text": text,
            "_env_variables": env_variables,
            "_format_python_code": format_python_code,
            "_imported_names": imported_names,
            "_layers": layers,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def fromfile(
        filename: str | Path,
        use_predefined_variables: bool = True,
        import_custom_modules: bool = True,
        use_environment_variables: bool = True,
        lazy_import: bool | None = None,
        format_python_code: bool = True,
    ) -> Config:
        """Read a ``.py``, ``.json``, ``.yaml``, ``.yml`` or ``.toml`` file and its bases.

        Args:
            filename: the file; a ``.py`` file is executed.
            use_predefined_variables: whether to replace ``{{ fileDirname }}`` and similar placeholders.
            import_custom_modules: whether to import the modules in ``custom_imports``.
            use_environment_variables: whether to replace ``{{ $NAME:default }}``.
            lazy_import: whether the file is a pure-Python configuration; None detects it.
            format_python_code: has no effect, since the text is always formatted.

        Raises:
            ConfigError: a subclass that depends on the problem; see :meth:`stratagem.config.Config.fromfile`.
        """
        path = Path(filename).expanduser()
        replaced = {"file": use_predefined_variables, "variable": use_environment_variables}
        kept = [kind for kind, replace in replaced.items() if not replace]
        reader = Reader(default_root(path), lazy_import, kept=kept, as_mmengine=True)
        loaded = merge_and_import(reader, reader.read_file(path), import_modules=import_custom_modules)
        return Config._of(loaded, str(filename), format_python_code)

    @staticmethod
    def fromstring(cfg_str: str, file_format: str) -> Config:
        """Read the text of a file with the suffix ``file_format``; paths in it are relative to the working directory.

        Raises:
            ConfigError: a subclass that depends on the problem; see :meth:`stratagem.config.Config.fromstring`.
        """
        reader = Reader(Path(), as_mmengine=True)
        layers = reader.read_text(cfg_str, file_format, "<string>")
        return Config._of(merge_and_import(reader, layers, import_modules=True), None, format_python_code=True)

    @staticmethod
    def _of(loaded: Loaded, filename: str | None, format_python_code: bool) -> Config:
        cfg = Config.__new__(Config)
        data = ConfigDict.with_positions(loaded.values, History(loaded.layers))
        cfg._set(data, filename, loaded.text, loaded.environment, format_python_code, set(), loaded.layers)
        return cfg

    @staticmethod
    def auto_argparser(description: str | None = None) -> tuple[ArgumentParser, Config]:
        """Return a parser with an option for each value of the file that the command line names, and its configuration."""
        first = ArgumentParser(description=description, add_help=False)
        first.add_argument("config", help="config file path")
        cfg = Config.fromfile(first.parse_known_args()[0].config)
        parser = ArgumentParser(description=description)
        parser.add_argument("config", help="config file path")
        _add_options(parser, cfg)
        return parser, cfg

    @property
    def filename(self) -> str | None:
        """The file that was loaded; None if there is none."""
        return self._filename

    @property
    def text(self) -> str:
        """The text of the files that were read, bases first."""
        return self._text

    @property
    def env_variables(self) -> dict[str, Any]:
        """The environment variables that the files use, with their values when they were read."""
        return self._env_variables

    @property
    def file_layers(self) -> tuple[Source, ...]:
        """The files and overrides that were merged, bases first; empty if the values come from the program."""
        return self._layers

    @property
    def pretty_text(self) -> str:
        """The merged values as Python, with sorted keys. Secrets are masked and values that Python cannot write are marked."""
        return text_of(_sorted(redacted(self.to_dict())), ".py", mark_unsupported=True)

    def where(self, key: str) -> str:
        """Return the file and line that set a top-level key, as a prefix of a message; empty if the program did."""
        found = History(self._layers).last((key,)) if any(key in layer.data for layer in self._layers) else None
        return f"{found.origin}: " if found else ""

    def merge_from_dict(self, options: Mapping[str, Any], allow_list_keys: bool = True) -> None:
        """Merge values by dotted key, such as ``{"model.layers.0.depth": 3}``.

        Args:
            options: values by dotted key.
            allow_list_keys: whether a numeric key selects an item of a list.

        Raises:
            ConfigKeyError: if a list index is out of range.
            ConfigTypeError: if a key is set in a value that is not a dict.
        """
        layer = Source("--cfg-options", nest(options), list_keys=allow_list_keys)
        values = merge(layer.data, as_plain(self._cfg_dict), list_keys=allow_list_keys)
        layers = (*self._layers, layer) if self._layers else ()
        object.__setattr__(self, "_cfg_dict", ConfigDict.with_positions(values, History(layers)))
        object.__setattr__(self, "_layers", layers)

    def dump(self, file: str | Path | None = None) -> Any:
        """Write the merged values to a file in the format of its suffix, or return the text if there is no file.

        Secrets are masked. Python text marks values that it cannot represent, and tuples become lists in JSON and YAML.
        """
        target = str(file if file is not None else self._filename or "config.py")
        if not target.endswith(".py"):
            values = redacted(self.to_dict())
            values = values if target.endswith((".pkl", ".pickle")) else _with_lists(values)
            return dump(values, file=None if file is None else str(file), file_format=target.rpartition(".")[2])
        if file is None:
            return self.pretty_text
        Path(file).write_text(self.pretty_text, encoding="utf-8")
        return None

    @staticmethod
    def diff(cfg1: str | Config, cfg2: str | Config) -> str:
        """Return a unified diff of two configurations, each given as a ``Config`` or the path of a file."""
        first, second = (Config.fromfile(each) if isinstance(each, str) else each for each in (cfg1, cfg2))
        lines = difflib.unified_diff(first.pretty_text.split("\n"), second.pretty_text.split("\n"))
        return "".join(f"{line}\n" for line in (*lines, ""))

    def to_dict(self, keep_imported: bool = False) -> dict[str, Any]:
        """Return the values as plain dicts, lists and tuples, with imported objects as dotted names.

        Args:
            keep_imported: has no effect, since imported names are never keys.
        """
        return self._cfg_dict.to_dict()

    def _to_lazy_dict(self, keep_imported: bool = False) -> dict[str, Any]:
        return self._cfg_dict._to_lazy_dict()

    def __repr__(self) -> str:
        return f"Config (path: {self._filename}): {redacted(self.to_dict())!r}"

    def __len__(self) -> int:
        return len(self._cfg_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self._cfg_dict)

    def __contains__(self, name: object) -> bool:
        return name in self._cfg_dict

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in Config.__annotations__:
            raise AttributeError(name)
        return getattr(self._cfg_dict, name)

    def __getitem__(self, name: str) -> Any:
        return self._cfg_dict[name]

    def __setattr__(self, name: str, value: Any) -> None:
        self._cfg_dict[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        self._cfg_dict[name] = value

    def __delattr__(self, name: str) -> None:
        del self._cfg_dict[name]

    def __delitem__(self, name: str) -> None:
        del self._cfg_dict[name]

    def __getstate__(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in Config.__annotations__)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._set(*state)

    def __copy__(self) -> Config:
        return self._with(self._cfg_dict.copy())

    def copy(self) -> Config:
        """Return a shallow copy; nested dicts are shared."""
        return copy.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        other = self._with(copy.deepcopy(self._cfg_dict, memo))
        memo[id(self)] = other
        return other

    def _with(self, data: ConfigDict) -> Config:
        other = type(self).__new__(type(self))
        other.__setstate__((data, *self.__getstate__()[1:]))
        return other


def _add_options(parser: ArgumentParser, values: Any, prefix: str = "") -> None:
    """Add an option for each value, with dotted names for the values of nested dicts."""
    for key, value in values.items():
        name = f"--{prefix}{key}"
        if isinstance(value, bool):
            parser.add_argument(name, action="store_true")
        elif isinstance(value, str | int | float):
            parser.add_argument(name, type=type(value))
        elif isinstance(value, Mapping):
            _add_options(parser, value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and len(value):
            parser.add_argument(name, type=type(value[0]), nargs="+")


def _with_lists(value: Any) -> Any:
    """Return a copy of nested values with lists instead of tuples."""
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, list | tuple) else value


def _sorted(value: Any) -> Any:
    """Return a copy of nested values with sorted keys."""
    if isinstance(value, Mapping):
        return {key: _sorted(item) for key, item in sorted(value.items(), key=lambda item: str(item[0]))}
    return type(value)(map(_sorted, value)) if type(value) in (list, tuple) else value
