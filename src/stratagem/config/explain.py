"""Show a configuration, and describe where a value was set."""

from __future__ import annotations

from stratagem.config.config import Config
from stratagem.config.history import Change, ChangeKind
from stratagem.config.keys import KeyPath, parse_path
from stratagem.config.node import as_plain
from stratagem.config.redact import redacted
from stratagem.config.text import text_of
from stratagem.errors import ConfigKeyError

__all__ = ["described_changes", "explain", "show"]

_WIDTH = 60


def show(config: Config, suffix: str = ".py", *, mark_unsupported: bool = False) -> str:
    """Return the merged configuration in the language of ``suffix``: ``.py``, ``.yaml``, ``.json`` or ``.toml``.

    Placeholders for environment variables are not replaced, and secrets are shown as ``{{ $SECRET:<path> }}``.

    Raises:
        ConfigFileError: if the suffix is unknown.
        ConfigValueError: if the language cannot represent a value, unless ``mark_unsupported`` is set; see
            :func:`~stratagem.config.text.text_of`.
    """
    return text_of(redacted(config.to_dict()), suffix, mark_unsupported=mark_unsupported)


def explain(config: Config, path: str) -> str:
    """Return a line for each file or override that set, changed or removed the value at a dotted path, in order.

    Values are formatted as in :func:`show`.

    Raises:
        ConfigKeyError: if the value was never set.
    """
    rows = [(each["where"], each["kind"], _shortened(each["value"])) for each in described_changes(config, path)]
    origin = config.where(path)
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    lines = [f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows]
    if origin is not None and origin.path == "the program":
        lines.append("  the program changed it later")
    return "\n".join([path, *lines])


def described_changes(config: Config, path: str) -> list[dict[str, str]]:
    """Return where the value at a dotted path was set, how (``kind``), and to what, in order.

    Values are Python expressions; the value of a removal is empty.

    Raises:
        ConfigKeyError: if the value was never set.
    """
    changes = config.explain(path)
    if not changes and config.where(path) is None:
        _refuse(config, path)
    keys = parse_path(path)
    return [{"where": str(each.origin), "kind": str(each.kind), "value": _value(each, keys)} for each in changes]


def _refuse(config: Config, path: str) -> None:
    """Look up each key of a path; the lookup of the missing key raises an error with the closest one."""
    node: object = config
    for key in path.split("."):
        if isinstance(node, list | tuple) and key.isdigit() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, Config | dict):
            node = node[key]
        else:
            raise ConfigKeyError(f"{path}: there is no value at {key!r}.")


def _value(change: Change, path: KeyPath) -> str:
    removed = change.value is None and change.kind is ChangeKind.REMOVED
    return "" if removed else repr(redacted(as_plain(change.value), path))


def _shortened(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
