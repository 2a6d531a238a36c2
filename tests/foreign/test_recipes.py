"""The recipes that use other packages print what their pages state."""

from __future__ import annotations

from pathlib import Path

import pytest

# timm and transformers import torchvision if it is installed.
import tests.foreign.torchvision_ops  # noqa: F401
from docs.site.include import Output
from docs.site.stage import ROOT
from tests.docs.test_recipes import HERE, OUTPUTS
from tests.support.program import run_in_process

pytestmark = [
    pytest.mark.foreign,
    pytest.mark.timeout(900),
    # Deprecated functions that these libraries call.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize(
    "output", [each for each in OUTPUTS if not each.file.endswith(HERE)], ids=lambda each: each.file
)
def test_a_recipe_prints_what_its_page_states(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The program trains with real data, and prints the lines on the page."""
    run_in_process(ROOT / output.file, tmp_path, monkeypatch)
    assert output.differences(capsys.readouterr().out) == []
