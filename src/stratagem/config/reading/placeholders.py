"""``{{ fileDirname }}``, ``{{ $NAME:default }}`` and ``{{ _base_.key }}`` in the text of a configuration.

``{{ $SECRET:key }}`` is what a kept configuration has in the place of a secret: it loads, and fails when it is used.

Values are never pasted into the text, where a quote or a backslash in them would change its meaning. A placeholder
becomes a word that every language reads as it is, and the word becomes the value after the text was parsed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
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

__all__ = ["BaseValues", "Placeholders", "masked_marker"]

BaseValues = Callable[[], Mapping[str, Any]]

# Possessive repeats (`*+`), since a text of a million blanks must not take hours.
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
# A default with such characters cannot be written in every language as it is.
_AWKWARD = re.compile(r"""['"\\]|[^ -~]""")
# Quoted text, in languages where a word must stand in quotes to be a value; YAML and Python can read a bare one.
_QUOTED = {
    ".json": re.compile(r'"(?:\\.|[^"\\\n])*"'),
    ".toml": re.compile(r'\"\"\".*?\"\"\"|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|\#[^\n]*', re.DOTALL),
}


def masked_marker(path: KeyPath) -> str:
    """Return what stands in a kept configuration for the secret at a path."""
    key = re.sub(r"[^-\w./ ]", "_", path_text(path))
    return f"{{{{ ${_MASKED}:{key} }}}}"


@final
class Placeholders:
    """The placeholders of one text. ``text`` is the text with a word in place of each.

    Args:
        text: What was read.
        suffix: Its language.
        name: The file, which the ``file...`` placeholders tell of.
        environment: Whether it may read environment variables.
    """

    # What was read from the environment, in whichever file.
    _read: ClassVar[set[str]] = set()

    def __init__(self, text: str, suffix: str, name: str, *, environment: bool = True) -> None:
        self.environment: dict[str, str] = {}
        self._may_read = environment
        self._name = name
        self._matches: list[re.Match[str]] = []
        self._bare: set[str] = set()
        self._stem = "placeholder_"
        while self._stem in text:
            self._stem += "_"
        self._word = re.compile(rf"{self._stem}\d+_")
        self.text = self._mark(text, suffix) if "{{" in text else text

    def __bool__(self) -> bool:
        return bool(self._matches)

    def reads_base(self, text: str) -> bool:
        """Return whether ``text`` holds the word of a placeholder that stands for a value of the base."""
        return any(self._match(word[0])["base"] for word in self._word.finditer(text))

    def is_word(self, text: str) -> bool:
        """Return whether ``text`` is the word of one placeholder and nothing else."""
        return self._word.fullmatch(text) is not None

    def has_word(self, text: str) -> bool:
        """Return whether the word of a placeholder is in ``text``."""
        return bool(self._matches) and self._word.search(text) is not None

    def value(self, word: str, base: BaseValues, *, bare: bool) -> Any:
        """Return the value of a placeholder. One outside of quotes is a number, a bool or None if it looks like one.

        A string from the environment is an :class:`InterpolatedStr`, and a masked secret is a :class:`MaskedSecret`.

        Raises:
            ConfigKeyError: if a variable is not set and has no default, or the base has no such key.
            ConfigValueError: if environment variables may not be read.
        """
        match = self._match(word)
        if match["base"]:
            return self._base_value(match["base"], base)
        if match["file"]:
            return self._file(match["file"])
        if _is_masked(match):
            path = _default(match)
            return MaskedSecret(f"{{{{ ${_MASKED}:{path} }}}}", path, self._where(match))
        text = self._variable(match)
        value = parse_scalar(text) if bare else text
        template = self._template(match)
        return InterpolatedStr(value, template) if isinstance(value, str) and template is not None else value

    def fill(self, text: str, base: BaseValues) -> Any:
        """Return ``text`` with the values in place of the words.

        With a string from the environment in it, it is an :class:`InterpolatedStr`; with a masked secret in it, a
        :class:`MaskedSecret`.
        """
        values = {word: self.value(word, base, bare=False) for word in self._word.findall(text)}
        if not values:
            return text
        template = self._word.sub(lambda word: self._shown(word[0], values[word[0]]), text)
        masked = [value for value in values.values() if isinstance(value, MaskedSecret)]
        if masked:
            return MaskedSecret(template, masked[0].path, masked[0].position)
        filled = self._word.sub(lambda word: str(values[word[0]]), text)
        return InterpolatedStr(filled, template) if template != filled else filled

    def fill_data(self, data: Any, base: BaseValues, path: KeyPath = ()) -> Any:
        """Return parsed data with values in place of words; a string that is one word becomes the value itself.

        Raises:
            ConfigValueError: if a value of the environment is a part of a URL; with file, line and key.
        """
        if isinstance(data, str):
            if self.is_word(data):
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
        """Refuse to send what the environment holds to a host that a data file names."""
        if not isinstance(value, str):
            return
        # As lenient as those that open URLs.
        if "://" not in "".join(value.split()).replace("\\", "/"):
            return
        for word in self._word.findall(text):
            match = self._match(word)
            from_base = match["base"] and _is_of_environment(self.value(word, base, bare=False), self._read)
            if from_base or (match["variable"] and not _is_masked(match)):
                raise ConfigValueError(
                    f"{self._where(match)}: {path_text(path)} puts {match[0]} into a URL. A data file must not send values of "
                    "the environment to a host that it names. Give the URL as a whole in an environment variable, in a .py "
                    "file or with --set."
                )

    def _match(self, word: str) -> re.Match[str]:
        return self._matches[int(word.removeprefix(self._stem).rstrip("_"))]

    def _shown(self, word: str, value: Any) -> str:
        """Return what a template has for a placeholder: itself for one of the environment, else its value."""
        template = template_of(value)
        if template is not None:
            return template
        match = self._match(word)
        if isinstance(value, MaskedSecret):
            return value.text
        own = self._template(match) if match["variable"] else None
        return str(value) if own is None else own

    def _template(self, match: re.Match[str]) -> str | None:
        """Return the placeholder of a variable in one form; None where its value is written out in the file."""
        name, default = match["variable"], _default(match)
        if match["default"] is None:
            return f"{{{{ ${name} }}}}"
        if is_secret_name(name) or _AWKWARD.search(default):
            return f"{{{{ ${name} }}}}" if name in os.environ else None
        return f"{{{{ ${name}:{default} }}}}"

    def _mark(self, text: str, suffix: str) -> str:
        quoted = _QUOTED.get(suffix)
        spans = [match.span() for match in quoted.finditer(text)] if quoted else []

        def mark(match: re.Match[str]) -> str:
            word = f"{self._stem}{len(self._matches)}_"
            self._matches.append(match)
            before, after = text[: match.start()][-1:], text[match.end() :][:1]
            if not (before == after and before in {"'", '"'}):
                self._bare.add(word)
            outside = quoted and not any(start < match.start() < end for start, end in spans)
            return f'"{word}"' if outside else word

        return _PLACEHOLDER.sub(mark, text)

    def _file(self, key: str) -> str:
        path = Path(os.path.abspath(self._name))  # noqa: PTH100 -- keeps links, as people wrote the path
        match key:
            case "fileDirname":
                return path.parent.as_posix()
            case "fileBasename":
                return path.name
            case "fileBasenameNoExtension":
                return path.stem
        return path.suffix

    def _variable(self, match: re.Match[str]) -> str:
        if not self._may_read:
            raise ConfigValueError(f"{self._where(match)}: environment variables are not read here, such as this one.")
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
    return match["variable"] == _MASKED and match["default"] is not None


def _is_of_environment(value: Any, read: set[str]) -> bool:
    """Return whether a value of the base has something in it that was read from the environment."""
    if isinstance(value, Mapping):
        return any(_is_of_environment(item, read) for item in value.values())
    if isinstance(value, list | tuple):
        return any(_is_of_environment(item, read) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return any(value == parse_scalar(text) for text in read)
    return template_of(value) is not None or isinstance(value, MaskedSecret)
