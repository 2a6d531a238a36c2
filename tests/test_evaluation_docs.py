"""The example on the page about evaluation runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"


@pytest.mark.slow
def test_the_complete_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The last Python example trains with two validation sets and writes predictions in the order of the data."""
    monkeypatch.chdir(tmp_path)
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[-1]
    names: dict[str, Any] = {}
    exec(compile(source, "evaluation.md", "exec"), names)
    assert set(names["runner"].run.metrics) == {"clean/accuracy", "noisy/accuracy"}
    assert len(names["results"]) == 100
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert (lines[0], len(lines)) == ("index,preds_0,preds_1,target", 101)
    assert next((tmp_path / "work_dirs" / "circle").glob("best_noisy_accuracy_epoch_*")).is_dir()
