"""Assemble the sources of the documentation site: ``python -m docs.site.stage FOLDER``.

The pages are the Markdown files of the repository. ``guide.md`` becomes a page per section, ``reference/`` is generated, and
links to other files of the repository lead to pages with their text. Links are rewritten to where the pages are.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from docs.site import reference
from docs.site.commands import commands

__all__ = ["Site", "navigation", "sources", "stage"]

ROOT: Final = Path(__file__).parents[2]
NAVIGATION: Final = Path(__file__).with_name("nav.toml")
# Files in the root of the repository, and their pages.
_ROOT_PAGES: Final = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/code-of-conduct.md",
}
# The generated pages, and all pages that no part lists.
_GENERATED: Final = "reference/*"
_ALL_OTHERS: Final = "docs/**"
_GUIDE: Final = Path("docs/guide.md")
_FENCE: Final = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK: Final = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\])*\])\(<?([^)\s>]+)>?((?:\s+\"[^\"]*\")?)\)")
_BESIDE: Final = re.compile(r"<!-- beside: begin -->\n(.*?)<!-- beside: end -->", re.DOTALL)
# What a program prints; its lines are long.
_OUTPUT: Final = re.compile(r"^<!-- output: .* -->\n```\n", re.MULTILINE)
_HEADING: Final = re.compile(r"^(#{1,6})\s+(.*?)\s*#*$", re.MULTILINE)
_LANGUAGES: Final = {
    ".py": "python",
    ".toml": "toml",
    ".sh": "bash",
    ".yaml": "yaml",
    ".yml": "yaml",
    ".json": "json",
    ".md": "markdown",
}


def slug(heading: str) -> str:
    """Return the anchor of a heading."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


@final
@dataclass(frozen=True, slots=True)
class Part:
    """A part of the navigation: a title and the pages, each a file in ``docs/`` or in the root of the repository."""

    title: str
    pages: tuple[str, ...]


def sources() -> list[Path]:
    """Return the Markdown files of the repository that are pages."""
    return [ROOT / name for name in page_files()]


def navigation() -> tuple[Part, ...]:
    """Return the parts of the navigation; together, they have all pages except the home page."""
    data: list[dict[str, Any]] = tomllib.loads(NAVIGATION.read_text(encoding="utf-8"))["part"]
    listed = [(each["title"], [name for pattern in each["pages"] for name in _expanded(pattern)]) for each in data]
    known = {name for _, names in listed for name in names}
    rest = [name for name in page_files() if name not in known and name != "README.md"]
    return tuple(
        Part(title, tuple(page for name in names for page in (rest if name == _ALL_OTHERS else [name])))
        for title, names in listed
    )


def _expanded(pattern: str) -> list[str]:
    if not pattern.endswith("*") or pattern in (_GENERATED, _ALL_OTHERS):
        return [pattern]
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(f"{pattern}.md"))


def page_files() -> list[str]:
    """Return all Markdown files that are pages, relative to the repository."""
    documents = (ROOT / "docs").rglob("*.md")
    return [*_ROOT_PAGES, *sorted(str(file.relative_to(ROOT)) for file in documents)]


@final
@dataclass(slots=True)
class Site:
    """The pages of the site while they are assembled.

    Attributes:
        folder: where the sources are written.
        guide: the page of each heading of the guide.
        files: the files of the repository that pages link to; each becomes a page.
    """

    folder: Path
    guide: Mapping[str, str] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)

    def place(self, file: str) -> str:
        """Return the page of a Markdown file of the repository."""
        return _ROOT_PAGES.get(file) or ("guide/index.md" if Path(file) == _GUIDE else file.removeprefix("docs/"))

    def write(self, page: str, text: str) -> None:
        """Write a page."""
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text.rstrip()}\n", encoding="utf-8")

    def rewritten(self, text: str, source: Path, page: str) -> str:
        """Return the text of a file with the links of its page; code is not changed."""
        kept: list[str] = []

        def hide(match: re.Match[str]) -> str:
            kept.append(match[0])
            return f"\0{len(kept) - 1}\0"

        text = _OUTPUT.sub(r"```{code-block} text\n:class: wrapped\n\n", text)
        text = _FENCE.sub(hide, text)
        text = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", lambda match: hide(match) if "](" in match[0] else match[0], text)
        text = _LINK.sub(lambda match: f"{match[1]}({self._target(match[2], source, page)}{match[3]})", text)
        if not page.startswith(("reference/", "project/changelog")):
            text = _with_reference_links(text, page)
        text = re.sub(r"\0(\d+)\0", lambda match: kept[int(match[1])], text)
        return _side_by_side(_with_inline_pictures(text, source))

    def _target(self, link: str, source: Path, page: str) -> str:
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            return link
        path, _, anchor = link.partition("#")
        target = (source.parent / path).resolve().relative_to(ROOT) if path else source.resolve().relative_to(ROOT)
        placed = self._page_of(target, anchor)
        if placed is None:
            return link
        relative = os.path.relpath(placed, Path(page).parent)
        return f"{relative}#{anchor}" if anchor else relative

    def _page_of(self, target: Path, anchor: str) -> str | None:
        name = str(target)
        if target == _GUIDE:
            return self.guide.get(anchor, "guide/index.md")
        if name in _ROOT_PAGES or (name.startswith("docs/") and target.suffix == ".md"):
            return self.place(name)
        if (ROOT / target).is_dir():
            return "decisions/index.md" if name == "docs/decisions" else self._file_page(target)
        if target.suffix == ".svg":
            return None  # It becomes a part of the page.
        if target.suffix == ".png":
            return self._copied(target)
        return self._file_page(target)

    def _copied(self, picture: Path) -> str:
        placed = str(picture).removeprefix("docs/")
        (self.folder / placed).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / picture, self.folder / placed)
        return placed

    def _file_page(self, target: Path) -> str:
        self.files.add(str(target))
        return f"files/{target}.md" if (ROOT / target).is_file() else f"files/{target}/index.md"


def _with_reference_links(text: str, page: str) -> str:
    """Link the names of classes and commands that are code to the reference, except in headings and in other links."""

    def linked(match: re.Match[str]) -> str:
        name = match[1]
        target = _reference_link(name)
        return f"[`{name}`]({os.path.relpath(target, Path(page).parent)})" if target else match[0]

    lines = text.split("\n")
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            parts = re.split(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\))", line)
            parts[::2] = [re.sub(r"(?<!`)`([^`\n]+)`(?!`)", linked, part) for part in parts[::2]]
            lines[number] = "".join(parts)
    return "\n".join(lines)


def _reference_link(name: str) -> str | None:
    """Return the page and anchor of the reference for a class name in CamelCase or a command."""
    if re.fullmatch(r"stratagem [a-z]+( [a-z]+)?", name) and name in _command_names():
        return f"reference/commands.md#{name.replace(' ', '-')}"
    is_class = re.fullmatch(r"(stratagem\.)?[A-Z]\w*[a-z]\w*", name)
    link = reference.link_of(name) if is_class else None
    return f"reference/{link}" if link else None


@functools.cache
def _command_names() -> frozenset[str]:
    return frozenset(name for name, _ in commands())


def _side_by_side(text: str) -> str:
    """Place the parts between ``<!-- beside: begin -->`` and ``end``, which begin with a bold line, next to each other."""
    parts = _BESIDE.split(text)
    for number, body in enumerate(parts[1::2]):
        columns = re.split(r"^(?=\*\*)", body.strip(), flags=re.MULTILINE)[1:]
        cells = "\n".join(f"::::{{grid-item}}\n{column.strip()}\n::::" for column in columns)
        parts[2 * number + 1] = f":::::{{grid}} 1 1 1 2\n:gutter: 2\n:class-container: beside\n\n{cells}\n:::::"
    text = "".join(parts)
    return f"---\nhide-toc: true\n---\n{text}" if len(parts) > 1 else text


def _with_inline_pictures(text: str, source: Path) -> str:
    """Insert SVG pictures into the page, so that they have the colors of the page's theme."""

    def picture(match: re.Match[str]) -> str:
        drawing = (source.parent / match[2]).read_text(encoding="utf-8")
        drawing = re.sub(r"<\?xml.*?\?>\s*", "", drawing)
        return f'```{{raw}} html\n<figure class="drawing" aria-label="{match[1]}">\n{drawing}</figure>\n```'

    return re.sub(r"^!\[([^\]]*)\]\(([^):]+\.svg)\)$", picture, text, flags=re.MULTILINE)


def _guide_pages(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield the page, the title and the text of each section of the guide; the first one is the introduction."""
    parts = re.split(r"^## (.*)$", text, flags=re.MULTILINE)
    yield "guide/index.md", "Guide", parts[0]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        yield f"guide/{slug(title)}.md", title, f"# {title}\n{body}"


def _headings_of_guide(text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for page, _, body in _guide_pages(text):
        for _, heading in _HEADING.findall(_FENCE.sub("", body)):
            found[slug(heading)] = page
    return found


def _stage_guide(site: Site) -> list[str]:
    """Write the pages of the guide, and return them."""
    source = ROOT / _GUIDE
    pages = list(_guide_pages(source.read_text(encoding="utf-8")))
    for page, _, body in pages[1:]:
        # A section is one level higher in its page than in the guide.
        raised = re.sub(r"^#(#{2,5} )", r"\1", body, flags=re.MULTILINE)
        site.write(page, site.rewritten(raised, source, page))
    index, _, introduction = pages[0]
    listed = "\n".join(f"- [{title}]({Path(page).name})" for page, title, _ in pages[1:])
    names = [Path(page).stem for page, _, _ in pages[1:]]
    site.write(index, f"{site.rewritten(introduction, source, index)}\n{listed}\n\n{_toctree('', names)}")
    return [index]


def _toctree(caption: str, names: list[str]) -> str:
    head = [":hidden:", *([f":caption: {caption}"] if caption else []), ":maxdepth: 2"]
    return "\n".join(("```{toctree}", *head, "", *names, "```"))


def _stage_folder_index(site: Site, folder: str, files: list[str]) -> str:
    """Write a page that lists the pages of a folder of ``docs/``."""
    rows = [f"- [{_title(ROOT / file)}]({Path(file).name})" for file in files]
    page = f"{folder}/index.md"
    title = folder.rpartition("/")[2].title()
    site.write(page, "\n".join((f"# {title}", "", *rows, "", _toctree("", [Path(file).stem for file in files]))))
    return page


def _title(file: Path) -> str:
    match = _HEADING.search(file.read_text(encoding="utf-8"))
    return match[2] if match else file.stem


def _stage_files(site: Site) -> None:
    """Write a page for each file and folder of the repository that pages link to."""
    waiting = sorted(site.files)
    while waiting:
        name = waiting.pop()
        path = ROOT / name
        if path.is_dir():
            inner = _tracked(name)
            rows = [f"- [{file}]({Path(file).relative_to(name)}.md)" for file in inner if _is_text(ROOT / file)]
            waiting += [file for file in inner if file not in site.files and _is_text(ROOT / file)]
            site.files.update(inner)
            site.write(f"files/{name}/index.md", "\n".join(("---\norphan: true\n---", f"# {name}", "", *rows)))
        else:
            copy = site.folder / "files" / f"{name}.txt"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            language = _LANGUAGES.get(path.suffix, "text")
            block = f"```{{literalinclude}} {path.name}.txt\n:language: {language}\n```"
            site.write(f"files/{name}.md", f"---\norphan: true\n---\n# {name}\n\n{block}")


def _tracked(folder: str) -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return sorted(str(file.relative_to(ROOT)) for file in (ROOT / folder).rglob("*") if file.is_file())
    listed = subprocess.run([git, "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True)
    return listed.stdout.splitlines()


def _is_text(file: Path) -> bool:
    return file.suffix in _LANGUAGES or file.suffix in (".txt", ".cfg", "")


def _stage_reference(site: Site, listed: set[str]) -> list[str]:
    """Write the reference; a page with handwritten text of the same name is an error."""
    pages = reference.pages()
    for page in pages:
        name = f"reference/{page.name}.md"
        if f"docs/{name}" in listed:
            raise ValueError(f"docs/{name} exists, but this page is generated.")
        site.write(name, site.rewritten(page.text, ROOT / "docs" / name, name))
    rows = [f"- [{page.title}]({page.name}.md)" for page in pages]
    index = ("# Reference", "", "These pages are generated from the code.", "", *rows, "")
    site.write("reference/index.md", "\n".join((*index, _toctree("", [page.name for page in pages]))))
    return ["reference/index.md"]


def stage(folder: Path) -> None:
    """Write the sources of the site to a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    site = Site(folder, _headings_of_guide((ROOT / _GUIDE).read_text(encoding="utf-8")))
    toctrees: list[str] = []
    for part in navigation():
        toctrees.append(_toctree(part.title, [str(Path(page).with_suffix("")) for page in _stage_part(site, part)]))
    home = ROOT / "README.md"
    site.write(
        "index.md", f"{site.rewritten(home.read_text(encoding='utf-8'), home, 'index.md')}\n" + "\n\n".join(toctrees)
    )
    _stage_files(site)


def _stage_part(site: Site, part: Part) -> Iterator[str]:
    """Write the pages of a part, and yield those that the navigation lists; pages of a folder are below its index."""
    folders: dict[str, list[str]] = {}
    for name in part.pages:
        folder = str(Path(name).parent)
        if f"{folder}/index.md" in part.pages or folder == "docs/decisions":
            folders.setdefault(folder, []).append(name)
    for name in part.pages:
        folder = str(Path(name).parent)
        if name == _GENERATED:
            yield from _stage_reference(site, set(page_files()))
        elif Path(name) == _GUIDE:
            yield from _stage_guide(site)
        else:
            page = site.place(name)
            text = site.rewritten((ROOT / name).read_text(encoding="utf-8"), ROOT / name, page)
            if name == f"{folder}/index.md":
                text += "\n" + _toctree("", [Path(each).stem for each in folders[folder] if each != name])
            site.write(page, text)
            if folder not in folders or name == f"{folder}/index.md":
                yield page
    if "docs/decisions" in folders:
        yield _stage_folder_index(site, "decisions", folders["docs/decisions"])


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
