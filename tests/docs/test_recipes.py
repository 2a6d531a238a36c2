"""The recipes that need no other packages print what their pages state."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.site.include import Output, outputs
from docs.site.stage import ROOT
from tests.support.program import run_example

HERE = ("kfold_sweep.py", "custom_parts.py", "all_the_usual.py")
OUTPUTS = [
    each
    for page in sorted((ROOT / "docs" / "recipes").glob("*.md"))
    for each in outputs(page.read_text(encoding="utf-8"))
]


@pytest.mark.slow
@pytest.mark.parametrize("output", [each for each in OUTPUTS if each.file.endswith(HERE)], ids=lambda each: each.file)
def test_a_recipe_prints_what_its_page_states(output: Output, tmp_path: Path) -> None:
    """The program trains with real data, and prints the lines on the page."""
    assert output.differences(run_example(ROOT / output.file, tmp_path)) == []


def test_every_recipe_is_on_a_page_with_its_output() -> None:
    """No recipe is left out, also of those that ``tests/foreign`` runs."""
    helpers = {"data.py", "bible.py"}
    recipes = {
        f"examples/recipes/{file.name}"
        for file in (ROOT / "examples" / "recipes").glob("*.py")
        if file.name not in helpers
    }
    assert {each.file for each in OUTPUTS} == recipes
