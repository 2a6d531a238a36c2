"""``{{ fileDirname }}``, ``{{ $NAME:default }}`` and ``{{ _base_.key }}`` in the text of a configuration.

Values are never pasted into the text, where a quote or a backslash in them would change its meaning. A placeholder
becomes a word that every language reads as it is, and the word becomes the value after the text was parsed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

from stratagem.config.node import ConfigDict
from stratagem.config.overrides import parse_scalar
from stratagem.errors import ConfigKeyError, ConfigValueError

__all__ = ["BaseValues", "Placeholders"]

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
# Quoted text, in languages where a word must stand in quotes to be a value; YAML and Python can read a bare one.
_QUOTED = {
    ".json": re.compile(r'"(?:\\.|[^"\\\n])*"'),
    ".toml": re.compile(r'\"\"\".*?\"\"\"|\'\'\'.*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'|\#[^\n]*', re.DOTALL),
}


@final
class Placeholders:
    """The placeholders of one text. ``text`` is the text with a word in place of each.

    Args:
        text: What was read.
        suffix: Its language.
        name: The file, which the ``file...`` placeholders tell of.
        environment: Whether it may read environment variables.
    """

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

    @property
    def reads_base(self) -> bool:
        """Whether a placeholder stands for a value of the base."""
        return any(match["base"] for match in self._matches)

    def is_word(self, text: str) -> bool:
        """Tell whether ``text`` is the word of one placeholder and nothing else."""
        return self._word.fullmatch(text) is not None

    def value(self, word: str, base: BaseValues, *, bare: bool) -> Any:
        """Return the value of a placeholder. One outside of quotes is a number, a bool or None if it looks like one.

        Raises:
            ConfigKeyError: if a variable is not set and has no default, or the base has no such key.
            ConfigValueError: if environment variables may not be read.
        """
        match = self._matches[int(word.removeprefix(self._stem).rstrip("_"))]
        if match["base"]:
            return self._base_value(match["base"], base)
        text = self._file(match["file"]) if match["file"] else self._variable(match)
        return parse_scalar(text) if bare and match["variable"] else text

    def fill(self, text: str, base: BaseValues) -> str:
        """Return ``text`` with the values in place of the words."""
        return self._word.sub(lambda word: str(self.value(word[0], base, bare=False)), text)

    def fill_data(self, data: Any, base: BaseValues) -> Any:
        """Return parsed data with values in place of words; a text that is one word becomes the value itself."""
        if isinstance(data, str):
            if self.is_word(data):
                return self.value(data, base, bare=data in self._bare)
            return self.fill(data, base)
        if isinstance(data, dict):
            return {self.fill_data(key, base): self.fill_data(value, base) for key, value in data.items()}
        if isinstance(data, list):
            return [self.fill_data(item, base) for item in data]
        return data

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
        name, default = match["variable"], (match["default"] or "").strip()
        value = os.environ.get(name, default.removesuffix(match["quote"]).rstrip())
        if not value and name not in os.environ:
            raise ConfigKeyError(
                f"{self._where(match)}: the environment variable {name} is not set and has no default. "
                f"Set it, or write {{{{ ${name}:default }}}}."
            )
        self.environment[name] = value
        return value

    def _base_value(self, path: str, base: BaseValues) -> Any:
        node: Any = ConfigDict(base())
        for key in path.split("."):
            node = node[int(key)] if isinstance(node, list | tuple) and key.isdigit() else node[key]
        return node.to_dict() if isinstance(node, ConfigDict) else node

    def _where(self, match: re.Match[str]) -> str:
        return f"{self._name}:{match.string.count(chr(10), 0, match.start()) + 1}"
