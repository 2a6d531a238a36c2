"""Read docstrings in Google style, and write them as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final, final

__all__ = ["Docstring", "inline", "read"]

_HEADING: Final = re.compile(
    r"^(Args|Arguments|Attributes|Keyword args|Returns|Raises|Yields|Example|Examples):\s*$", re.IGNORECASE
)
_ITEM: Final = re.compile(r"^(\*{0,2}[\w.]+(?:, \*{0,2}[\w.]+)*)\s*(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?:\s+(.*)$")
_ROLE: Final = re.compile(r":(?:py:)?(?:class|func|meth|mod|attr|data|exc|obj):`(~?)([^`]+)`")
_NAMED: Final = {"arguments": "args", "keyword args": "args", "example": "examples"}


@final
@dataclass(frozen=True, slots=True)
class Docstring:
    """The parts of a docstring.

    Attributes:
        text: the description, before the sections.
        sections: the lines of each section by its name in lower case, such as ``"raises"``.
    """

    text: str = ""
    sections: dict[str, str] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The first paragraph, in one line."""
        return " ".join(self.text.split("\n\n", 1)[0].split())

    def items(self, section: str) -> dict[str, str]:
        """Return the named items of a section, such as arguments, with their descriptions."""
        found: dict[str, str] = {}
        names: list[str] = []
        for line in self.sections.get(section, "").splitlines():
            match = _ITEM.match(line)
            if match:
                names = [name.strip().lstrip("*") for name in match[1].split(",")]
                found.update(dict.fromkeys(names, match[2]))
            elif names and line.startswith("    "):
                found.update({name: f"{found[name]}\n{line[4:]}" for name in names})
            elif names and not line:
                found.update({name: f"{found[name]}\n" for name in names})
        return {name: text.strip() for name, text in found.items()}


def read(target: Any) -> Docstring:
    """Return the docstring of an object; inherited ones count only for methods."""
    text = target.__doc__ if isinstance(target, type) else inspect.getdoc(target)
    return parse(inspect.cleandoc(text or ""))


def parse(text: str) -> Docstring:
    """Split a docstring into its description and its sections."""
    description: list[str] = []
    sections: dict[str, list[str]] = {}
    into = description
    for line in text.splitlines():
        heading = _HEADING.match(line)
        if heading:
            name = heading[1].lower()
            into = sections.setdefault(_NAMED.get(name, name), [])
        elif into is not description and line and not line.startswith(" "):
            into = description  # text after a section
            into.extend(("", line))
        else:
            into.append(line)
    return Docstring(
        "\n".join(description).strip(),
        {name: inspect.cleandoc("\n" + "\n".join(lines)) for name, lines in sections.items()},
    )


def inline(text: str, link: Callable[[str], str | None]) -> str:
    """Return Markdown for the text of a docstring: roles become links, and literal blocks become code blocks.

    Args:
        text: the text.
        link: returns the link target of a dotted name, or None if no page describes it.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[2].split("<")[-1].rstrip(">").strip()
        shown = name.rpartition(".")[2] if match[1] or "." in name else name
        shown += "()" if match[0].startswith((":func:", ":meth:")) else ""
        target = link(name)
        return f"`{shown}`" if target is None else f"[`{shown}`]({target})"

    return "\n".join(_with_code_blocks(_ROLE.sub(replaced, text).splitlines()))


def _with_code_blocks(lines: Iterable[str]) -> Iterable[str]:
    """Turn the indented block after a line that ends with ``::`` into a fenced one."""
    expected = inside = False
    for line in lines:
        if inside and line and not line.startswith(" "):
            yield "```"
            yield ""
            inside = False
        if expected and line.startswith("    "):
            yield "```python"
            expected, inside = False, True
        if inside:
            yield line[4:] if line.startswith("    ") else line
        elif line.endswith("::") and not line.lstrip().startswith(":::"):
            expected = True
            yield line[:-1]
        else:
            yield line
    if inside:
        yield "```"
