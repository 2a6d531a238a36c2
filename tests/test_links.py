"""The links in all Markdown files resolve."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^(```|~~~).*?^\1", flags=re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that a renderer makes for the headings of a Markdown text."""
    seen: dict[str, int] = {}
    found = set()
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        count = seen.get(name, 0)
        seen[name] = count + 1
        found.add(f"{name}-{count}" if count else name)
    return found


def broken_links(file: Path) -> Iterator[str]:
    """Yield a line for each local link of a file whose target or anchor does not exist."""
    text = file.read_text(encoding="utf-8")
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path) if path else file
        if not linked.exists():
            yield f"{file.name}: {target} does not exist"
        elif anchor and linked.suffix == ".md" and anchor not in anchors(linked.read_text(encoding="utf-8")):
            yield f"{file.name}: {linked.name} has no heading for #{anchor}"


def markdown_files() -> list[Path]:
    """Return all Markdown files of the repository."""
    return [
        *ROOT.glob("*.md"),
        *(file for name in ("docs", "examples", "tests") for file in (ROOT / name).rglob("*.md")),
    ]


def test_local_links_resolve() -> None:
    """Every link to a file or a heading of this repository resolves."""
    files = markdown_files()
    assert ROOT / "README.md" in files
    assert [line for file in files for line in broken_links(file)] == []


@pytest.mark.parametrize(
    ("text", "count"),
    [("[a](b.md)", 1), ("[a](#what-is-it)\n## What is it?", 0), ("[a](#other)\n# One", 1), ("`[a](b.md)`\n", 1)],
)
def test_the_check_finds_broken_links(tmp_path: Path, text: str, count: int) -> None:
    """A link to a missing file or heading is reported."""
    file = tmp_path / "page.md"
    file.write_text(text)
    assert len(list(broken_links(file))) == count
