"""The recipes that need no other packages, and the programs of "What to do when", print what their pages state."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs.site.include import Output, outputs
from docs.site.stage import ROOT
from tests.support.program import run_in_process

HERE = ("kfold_sweep.py", "custom_parts.py", "all_the_usual.py", "nan.py", "slow_data.py", "other_numbers.py")
OUTPUTS = [
    each
    for folder in ("recipes", "when")
    for page in sorted((ROOT / "docs" / folder).glob("*.md"))
    for each in outputs(page.read_text(encoding="utf-8"))
]


@pytest.mark.slow
@pytest.mark.parametrize("output", [each for each in OUTPUTS if each.file.endswith(HERE)], ids=lambda each: each.file)
def test_a_program_prints_what_its_page_states(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program trains, and prints the lines on the page."""
    run_in_process(ROOT / output.file, tmp_path, monkeypatch)
    assert output.differences(capsys.readouterr().out) == []


def test_every_program_is_on_a_page_with_its_output() -> None:
    """No program is left out, also of those that ``tests/foreign`` runs."""
    helpers = {"data.py", "bible.py"}
    programs = {
        str(file.relative_to(ROOT))
        for folder in ("recipes", "symptoms")
        for file in (ROOT / "examples" / folder).glob("*.py")
        if file.name not in helpers
    }
    assert {each.file for each in OUTPUTS} == programs
