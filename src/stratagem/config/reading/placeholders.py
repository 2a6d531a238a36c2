"""Placeholders in configuration files: ``{{ fileDirname }}``, ``{{ $NAME:default }}`` and ``{{ _base_.key }}``.

A saved configuration contains ``{{ $SECRET:key }}`` instead of a secret, and ``{{ $UNSAVED:key }}`` instead of a value
that it cannot contain. It can be loaded but raises an error when the value is used.

Values are not substituted in the text, where a quote or a backslash in a value would change its meaning. Each placeholder is
replaced with an identifier that is valid in every language, and the identifier is replaced with the value after the text is
parsed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

from stratagem.config.keys import KeyPath, path_text
from stratagem.config.node import ConfigDict
from stratagem.config.overrides import parse_scalar
from stratagem.errors import ConfigKeyError, ConfigValueError
from stratagem.utils.data_names import InterpolatedStr, template_of
from stratagem.utils.lazy import MaskedSecret
from stratagem.utils.secrets.names import is_secret_name
from stratagem.utils.secrets.values import remember_placeholder, remember_secret

__all__ = ["BaseValues", "Placeholders", "masked_marker", "masked_placeholders", "unsaved_marker"]

BaseValues = Callable[[], Mapping[str, Any]]

# Possessive quantifiers (`*+`), so that matching takes linear time, even for a million spaces.
_PLACEHOLDER = re.compile(
    r"""\{\{\s*+(?:
        (?P<file>fileDirname|fileBasenameNoExtension|fileBasename|fileExtname)
      | (?P<quote>['"]?)\s*+\$\s*+(?P<variable>\w++)\s*+(?::(?P<default>[^{}\n]*+)|['"]?)
      | _base_\.(?P<base>\w++(?:\.\w++)*+)
    )\s*+\}\}""",
    re.VERBOSE,
)
# The variable of a placeholder that stands for a masked secret; its "default" is the key of the secret.
_MASKED = "SECRET"
# The variable of a placeholder that stands for a value that could not be written.
_UNSAVED = "UNSAVED"
# A default with these characters cannot be written unescaped in every language.
_NEEDS_ESCAPING = re.compile(r"""['"\\]|[^ -~]""")
# Quoted strings, in languages that require quotes around strings. YAML and Python can parse a bare identifier.
_QUOTED = {
    ".json": re.compile(r'"(?:\\.|[^"\\\n])*"'),
    ".toml": re.compile(r'\"\"\".*?\"\"\"|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|\#[^\n]*', re.DOTALL),
}


def masked_marker(path: KeyPath) -> str:
    """Return the marker that replaces the secret at a path in a saved configuration."""
    return _marker(_MASKED, path)


def unsaved_marker(path: KeyPath) -> str:
    """Return the marker that replaces the value at a path if a saved configuration cannot contain the value."""
    return _marker(_UNSAVED, path)


def _marker(variable: str, path: KeyPath) -> str:
    key = re.sub(r"[^-\w./ ]", "_", path_text(path))
    return f"{{{{ ${variable}:{key} }}}}"


def masked_placeholders(text: str) -> str:
    """Return ``text`` with each placeholder replaced by an identifier of the same length, so that Python can parse it."""
    return _PLACEHOLDER.sub(lambda match: "_".ljust(len(match[0]), "_"), text)


@final
class Placeholders:
    """The placeholders in a text. In the attribute ``text``, each placeholder is replaced with an identifier.

    Args:
        text: The contents of the file.
        suffix: The suffix of the language.
        name: The file name, to which the ``file...`` placeholders refer.
        environment: Whether placeholders may read environment variables.
        kept: The kinds of placeholders, ``"file"`` and ``"variable"``, that are not replaced.
    """

    # The values that were read from the environment, by any file.
    _read: ClassVar[set[str]] = set()

    def __init__(
        self, text: str, suffix: str, name: str, *, environment: bool = True, kept: Collection[str] = ()
    ) -> None:
        self.environment: dict[str, str] = {}
        self._may_read_environment = environment
        self._name = name
        self._kept = kept
        self._matches: list[re.Match[str]] = []
        self._bare: set[str] = set()
        self._stem = "placeholder_"
        while self._stem in text:
            self._stem += "_"
        self._identifier = re.compile(rf"{self._stem}\d+_")
        self.text = self._mark(text, suffix) if "{{" in text else text

    def __bool__(self) -> bool:
        return bool(self._matches)

    def base_names(self, text: str | None = None) -> set[str]:
        """Return the top-level keys in the ``{{ _base_.key }}`` placeholders whose identifiers ``text`` contains.

        By default, these are all placeholders of the file.
        """
        found = self._identifier.finditer(self.text if text is None else text) if self._matches else ()
        paths = [self._match(identifier[0])["base"] for identifier in found]
        return {path.partition(".")[0] for path in paths if path}

    def is_identifier(self, text: str) -> bool:
        """Return whether ``text`` is exactly the identifier of a placeholder."""
        return self._identifier.fullmatch(text) is not None

    def has_identifier(self, text: str) -> bool:
        """Return whether ``text`` contains the identifier of a placeholder."""
        return bool(self._matches) and self._identifier.search(text) is not None

    def value(self, identifier: str, base: BaseValues, *, bare: bool) -> Any:
        """Return the value of a placeholder. Outside quotes (``bare``), it is parsed as a number, a bool or None if possible.

        A string from the environment is an :class:`InterpolatedStr`, and a masked secret is a :class:`MaskedSecret`.

        Raises:
            ConfigKeyError: if a variable is not set and has no default, or the base does not have the key.
            ConfigValueError: if environment variables may not be read.
        """
        match = self._match(identifier)
        if match["base"]:
            return self._base_value(match["base"], base)
        if match["file"]:
            return self._file(match["file"])
        if _is_masked(match):
            path = _default(match)
            variable = match["variable"]
            return MaskedSecret(
                f"{{{{ ${variable}:{path} }}}}", path, self._where(match), is_secret=variable == _MASKED
            )
        text = self._variable(match)
        value = parse_scalar(text) if bare else text
        template = self._template(match)
        return InterpolatedStr(value, template) if isinstance(value, str) and template is not None else value

    def fill(self, text: str, base: BaseValues) -> Any:
        """Return ``text`` with the identifiers replaced by their values.

        The result is an :class:`InterpolatedStr` if it contains values of environment variables, and a
        :class:`MaskedSecret` if it contains a masked secret.
        """
        values = {identifier: self.value(identifier, base, bare=False) for identifier in self._identifier.findall(text)}
        if not values:
            return text
        template = self._identifier.sub(
            lambda identifier: self._template_text(identifier[0], values[identifier[0]]), text
        )
        masked = [value for value in values.values() if isinstance(value, MaskedSecret)]
        if masked:
            return MaskedSecret(template, masked[0].path, masked[0].position, is_secret=masked[0].is_secret)
        filled = self._identifier.sub(lambda identifier: str(values[identifier[0]]), text)
        return InterpolatedStr(filled, template) if template != filled else filled

    def fill_data(self, data: Any, base: BaseValues, path: KeyPath = ()) -> Any:
        """Return parsed data with the identifiers replaced. A string that consists of one identifier becomes the value itself.

        Raises:
            ConfigValueError: if a URL contains the value of an environment variable.
        """
        if isinstance(data, str):
            if self.is_identifier(data):
                return self.value(data, base, bare=data in self._bare)
            value = self.fill(data, base)
            self._refuse_in_url(data, value, base, path)
            return value
        if isinstance(data, dict):
            return {self._fill_key(key, base): self.fill_data(item, base, (*path, key)) for key, item in data.items()}
        if isinstance(data, list):
            return [self.fill_data(item, base, (*path, index)) for index, item in enumerate(data)]
        return data

    def _fill_key(self, key: Any, base: BaseValues) -> Any:
        value = self.fill_data(key, base, ("a key",))
        return value.text if isinstance(value, MaskedSecret) else value

    def _refuse_in_url(self, text: str, value: Any, base: BaseValues, path: KeyPath) -> None:
        """Raise an error if a data file puts the value of an environment variable into a URL, which would send it to a host."""
        if not isinstance(value, str):
            return
        # Match as leniently as the libraries that open URLs.
        if "://" not in "".join(value.split()).replace("\\", "/"):
            return
        for identifier in self._identifier.findall(text):
            match = self._match(identifier)
            from_base = match["base"] and _is_of_environment(self.value(identifier, base, bare=False), self._read)
            if from_base or (match["variable"] and not _is_masked(match)):
                raise ConfigValueError(
                    f"{self._where(match)}: {path_text(path)} puts {match[0]} into a URL. A data file must not send values of "
                    "environment variables to a host of its choice. Set the whole URL with an environment variable, in a .py "
                    "file or with --set."
                )

    def _match(self, identifier: str) -> re.Match[str]:
        return self._matches[int(identifier.removeprefix(self._stem).rstrip("_"))]

    def _template_text(self, identifier: str, value: Any) -> str:
        """Return the text of a placeholder in a template: the placeholder of an environment variable, otherwise the value."""
        template = template_of(value)
        if template is not None:
            return template
        match = self._match(identifier)
        if isinstance(value, MaskedSecret):
            return value.text
        own = self._template(match) if match["variable"] else None
        return str(value) if own is None else own

    def _template(self, match: re.Match[str]) -> str | None:
        """Return the placeholder of a variable in normal form; None if its default from the file should be used."""
        name, default = match["variable"], _default(match)
        if match["default"] is None:
            return f"{{{{ ${name} }}}}"
        if is_secret_name(name) or _NEEDS_ESCAPING.search(default):
            return f"{{{{ ${name} }}}}" if name in os.environ else None
        return f"{{{{ ${name}:{default} }}}}"

    def _mark(self, text: str, suffix: str) -> str:
        quoted = _QUOTED.get(suffix)
        spans = [match.span() for match in quoted.finditer(text)] if quoted else []

        def mark(match: re.Match[str]) -> str:
            if any(match[kind] for kind in self._kept):
                return match[0]
            identifier = f"{self._stem}{len(self._matches)}_"
            self._matches.append(match)
            before, after = text[: match.start()][-1:], text[match.end() :][:1]
            if not (before == after and before in {"'", '"'}):
                self._bare.add(identifier)
            outside = quoted and not any(start < match.start() < end for start, end in spans)
            return f'"{identifier}"' if outside else identifier

        return _PLACEHOLDER.sub(mark, text)

    def _file(self, key: str) -> str:
        path = Path(os.path.abspath(self._name))  # noqa: PTH100 -- does not resolve symbolic links
        match key:
            case "fileDirname":
                return path.parent.as_posix()
            case "fileBasename":
                return path.name
            case "fileBasenameNoExtension":
                return path.stem
        return path.suffix

    def _variable(self, match: re.Match[str]) -> str:
        if not self._may_read_environment:
            raise ConfigValueError(
                f"{self._where(match)}: this file must not read environment variables, such as {match['variable']}."
            )
        name = match["variable"]
        if name not in os.environ and is_secret_name(name):
            remember_secret(_default(match))
        value = os.environ.get(name, _default(match))
        if not value and name not in os.environ:
            raise ConfigKeyError(
                f"{self._where(match)}: the environment variable {name} is not set and has no default. "
                f"Set it, or write {{{{ ${name}:default }}}}."
            )
        self.environment[name] = value
        if name in os.environ:
            self._read.add(value)
            remember_placeholder(value, name)
        return value

    def _base_value(self, path: str, base: BaseValues) -> Any:
        node: Any = ConfigDict(base())
        for key in path.split("."):
            node = node[int(key)] if isinstance(node, list | tuple) and key.isdigit() else node[key]
        return node.to_dict() if isinstance(node, ConfigDict) else node

    def _where(self, match: re.Match[str]) -> str:
        return f"{self._name}:{match.string.count(chr(10), 0, match.start()) + 1}"


def _default(match: re.Match[str]) -> str:
    return (match["default"] or "").strip().removesuffix(match["quote"] or "").rstrip()


def _is_masked(match: re.Match[str]) -> bool:
    return match["variable"] in (_MASKED, _UNSAVED) and match["default"] is not None


def _is_of_environment(value: Any, read: set[str]) -> bool:
    """Return whether a base's value contains the value of an environment variable."""
    if isinstance(value, Mapping):
        return any(_is_of_environment(item, read) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_is_of_environment(item, read) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return any(value == parse_scalar(text) for text in read)
    return template_of(value) is not None or isinstance(value, MaskedSecret)
