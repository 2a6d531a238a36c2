"""Code on pages that is the code of files: ``python -m docs.site.include`` writes it to all pages.

The code block after ``<!-- include: FILE -->`` contains a file, and after ``<!-- include: FILE NAME -->`` the lines between
``# docs: begin NAME`` and ``# docs: end NAME``. The block after ``<!-- output: FILE, within X -->`` contains what the file
prints; the numbers may differ by the relative difference X. ``tests/docs`` checks the code, and the tests that run the files
check the output.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from docs.site.stage import ROOT, sources

__all__ = ["Output", "included", "outputs"]

_INCLUDE: Final = re.compile(
    r"(<!-- include: (\S+)(?: (\S+))? -->\n(?:\n)?```\w*\n)(.*?)(^```$)", re.DOTALL | re.MULTILINE
)
_OUTPUT: Final = re.compile(r"<!-- output: (\S+), within (\S+) -->\n```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
_MARK: Final = re.compile(r"^\s*# docs: (?:begin|end) .*\n", re.MULTILINE)


def included(text: str) -> str:
    """Return a page with the current code of its files."""
    return _INCLUDE.sub(lambda match: f"{match[1]}{_code(match[2], match[3])}{match[5]}", text)


def _code(file: str, name: str | None) -> str:
    text = (ROOT / file).read_text(encoding="utf-8")
    if name is not None:
        found = re.search(rf"^ *# docs: begin {name}\n(.*?)^ *# docs: end {name}$", text, re.DOTALL | re.MULTILINE)
        if found is None:
            raise ValueError(f"{file} has no lines between '# docs: begin {name}' and '# docs: end {name}'.")
        text = textwrap.dedent(found[1])
    return _MARK.sub("", text).strip("\n") + "\n"


@final
@dataclass(frozen=True, slots=True)
class Output:
    """What a page states that a file prints.

    Attributes:
        file: the file, relative to the repository.
        within: the relative difference that numbers may have.
        text: the lines.
    """

    file: str
    within: float
    text: str

    def differences(self, printed: str) -> list[str]:
        """Return the lines of the page that the printed text does not contain, compared with the closest line."""
        lines = [line.strip() for line in printed.splitlines()]
        return [
            line
            for line in self.text.splitlines()
            if line.strip() and not any(self._equal(line.strip(), each) for each in lines)
        ]

    def _equal(self, expected: str, line: str) -> bool:
        if _NUMBER.sub("#", " ".join(expected.split())) != _NUMBER.sub("#", " ".join(line.split())):
            return False
        pairs = zip(_NUMBER.findall(expected), _NUMBER.findall(line), strict=True)
        return all(_close(first, second, self.within) for first, second in pairs)


def _close(first: str, second: str, within: float) -> bool:
    # Counts must be equal; measured values have a decimal point.
    if first == second or not {".", "e"} & {*first, *second}:
        return first == second
    return abs(float(first) - float(second)) <= within * max(abs(float(first)), abs(float(second)))


def outputs(text: str) -> Iterator[Output]:
    """Yield the outputs of a page."""
    for file, within, lines in _OUTPUT.findall(text):
        yield Output(file, float(within), lines)


if __name__ == "__main__":
    for page in sources():
        before = page.read_text(encoding="utf-8")
        after = included(before)
        if after != before:
            Path(page).write_text(after, encoding="utf-8")
