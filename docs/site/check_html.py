"""Check the built site: all links resolve, and no page loads anything from a network. ``check_html.py FOLDER``."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADING = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src")}
_NOT_LOADED = {"canonical", "next", "prev", "author", "index", "search", "genindex"}


class _Links(HTMLParser):
    """The anchors of a page, the targets of its links, and what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        for element, name in _LOADING:
            if tag == element and name in values and values.get("rel") not in _NOT_LOADED:
                self.loaded.append(values[name])


def problems(folder: Path) -> list[str]:
    """Return a line for each broken link and each resource of another server."""
    pages = {file.resolve(): _read(file) for file in folder.rglob("*.html")}
    found = []
    for file, page in pages.items():
        name = file.relative_to(folder.resolve())
        found += [f"{name} loads {url}" for url in page.loaded if re.match(r"(https?:)?//", url)]
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link in ("", "#"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not target.exists():
                found.append(f"{name}: {link} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {link} has no such anchor")
    for style in folder.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        found += [
            f"{style.name} loads {url}"
            for url in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')\s]+)", text)
        ]
    return found


def _read(file: Path) -> _Links:
    links = _Links()
    links.feed(file.read_text(encoding="utf-8"))
    return links


if __name__ == "__main__":
    lines = problems(Path(sys.argv[1]))
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.exit(1 if lines else 0)
