"""Say in words where a value comes from."""

from __future__ import annotations

from stratagem.config.config import Config
from stratagem.config.history import Change, ChangeKind
from stratagem.config.keys import KeyPath, parse_path
from stratagem.config.node import as_plain
from stratagem.config.redact import redacted
from stratagem.config.text import text_of
from stratagem.errors import ConfigKeyError

__all__ = ["explain", "show"]

_WIDTH = 60


def show(config: Config, suffix: str = ".py") -> str:
    """Return the merged configuration in the language of ``suffix``: ``.py``, ``.yaml``, ``.json`` or ``.toml``.

    Placeholders for environment variables are shown as placeholders, and secrets as ``{{ $SECRET:<path> }}``.

    Raises:
        ConfigFileError: for another suffix.
        ConfigValueError: if a value cannot be said in that language.
    """
    return text_of(redacted(config.to_dict()), suffix)


def explain(config: Config, path: str) -> str:
    """Return a line for each file or override that gave or changed the value at a dotted path, in order.

    Values are shown as :func:`show` does.

    Raises:
        ConfigKeyError: if there is no such value and never was.
    """
    changes = config.explain(path)
    origin = config.where(path)
    if not changes and origin is None:
        _refuse(config, path)
    keys = parse_path(path)
    rows = [(str(change.origin), str(change.kind), _short(change, keys)) for change in changes]
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows]
    if origin is not None and origin.path == "the program":
        lines.append("  the program set it afterwards")
    return "\n".join([path, *lines])


def _refuse(config: Config, path: str) -> None:
    """Walk down until a key is missing, which raises with the nearest one."""
    node: object = config
    for key in path.split("."):
        if isinstance(node, list | tuple) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, Config | dict):
            node = node[key]
        else:
            raise ConfigKeyError(f"{path}: nothing lies below {key!r} there.")


def _short(change: Change, path: KeyPath) -> str:
    removed = change.value is None and change.kind is ChangeKind.REMOVED
    text = "" if removed else repr(redacted(as_plain(change.value), path))
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
