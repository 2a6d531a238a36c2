"""The code on the pages is the code of the files that are tested, and the outputs are those of the programs."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.site.check_html import problems
from docs.site.include import Output, included, outputs
from docs.site.stage import ROOT, Site, navigation, sources
from tests.support.program import run_example

# Importing all registered classes also imports the TorchScript compiler.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

PAGES = {str(page.relative_to(ROOT)): page for page in sources()}


@pytest.mark.parametrize(
    "page", [name for name, file in PAGES.items() if "<!-- include:" in file.read_text(encoding="utf-8")]
)
def test_the_code_on_a_page_is_that_of_its_files(page: str) -> None:
    """If this fails, run ``python -m docs.site.include``."""
    text = PAGES[page].read_text(encoding="utf-8")
    assert included(text) == text


def test_every_page_of_the_documentation_is_in_the_navigation_once() -> None:
    """Pages that nav.toml does not list belong to the part with ``docs/**``; listed pages exist."""
    listed = sorted(name for part in navigation() for name in part.pages if name != "reference/*")
    assert listed == sorted(name for name in PAGES if name != "README.md")


@pytest.mark.slow
@pytest.mark.parametrize(
    "output", list(outputs(PAGES["docs/quickstart.md"].read_text(encoding="utf-8"))), ids=lambda each: each.file
)
def test_the_quick_start_prints_what_its_page_states(output: Output, tmp_path: Path) -> None:
    """The program of the quick start trains, resumes, and prints the lines on the page."""
    assert output.differences(run_example(ROOT / output.file, tmp_path)) == []


@pytest.mark.parametrize(
    ("printed", "equal"),
    [
        ("step 20: accuracy 0.975", True),
        ("step 21: accuracy 0.98", False),
        ("step 20: accuracy 0.9", False),
        ("step 20", False),
    ],
)
def test_outputs_are_compared_with_a_tolerance_for_measured_values_only(printed: str, equal: bool) -> None:
    """Counts and words must be equal."""
    assert (Output("file", 0.02, "step 20: accuracy 0.98\n").differences(printed) == []) is equal


@pytest.mark.slow
def test_links_lead_to_where_the_pages_of_the_site_are(tmp_path: Path) -> None:
    """Links to sections of the guide, to files of the repository and names of classes are rewritten; code is unchanged."""
    site = Site(tmp_path, {"averaged-weights": "guide/iterations-and-steps.md"})
    text = "[a](guide.md#averaged-weights) [b](../src/stratagem/step.py) `EMAHook` `[c](guide.md)`\n```\n[d](guide.md)\n```"
    assert site.rewritten(text, ROOT / "docs/gpu.md", "gpu.md") == (
        "[a](guide/iterations-and-steps.md#averaged-weights) [b](files/src/stratagem/step.py.md) "
        "[`EMAHook`](reference/hooks.md#emahook) `[c](guide.md)`\n```\n[d](guide.md)\n```"
    )
    assert site.files == {"src/stratagem/step.py"}


def test_programs_side_by_side_become_columns_and_outputs_are_wrapped(tmp_path: Path) -> None:
    """The parts between the comments are items of a grid, in order."""
    columns = "<!-- beside: begin -->\n**A**\n\none\n\n**B**\n\ntwo\n<!-- beside: end -->\n"
    text = f"{columns}<!-- output: a.py, within 0 -->\n```\nx\n```"
    found = Site(tmp_path).rewritten(text, ROOT / "docs/gpu.md", "gpu.md")
    assert (
        found.index("{grid-item}\n**A**") < found.index("{grid-item}\n**B**") < found.index(":class: wrapped\n\nx\n```")
    )


def test_the_check_of_the_built_site_finds_broken_links_and_resources_of_other_servers(tmp_path: Path) -> None:
    """Missing files, missing anchors, scripts and fonts from a network are reported."""
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">b</a><a href="c.html">c</a><script src="https://x.org/x.js"></script>'
    )
    (tmp_path / "b.html").write_text('<p id="there"></p><a href="a.html">a</a><a href="https://x.org">x</a>')
    (tmp_path / "s.css").write_text("@font-face { src: url('//x.org/font.woff') }")
    assert sorted(problems(tmp_path)) == [
        "a.html loads https://x.org/x.js",
        "a.html: b.html#here has no such anchor",
        "a.html: c.html does not exist",
        "s.css loads //x.org/font.woff",
    ]
