"""``stratagem profile`` on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_a_profile_of_a_configuration_is_printed(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """The report has the parts of an iteration; the trace is in the work directory, and there are no checkpoints."""
    found = json.loads(stratagem("profile", config, "--steps", "2", "--skip", "0", "--json").out)
    assert found["iterations"] == 2
    assert {"data", "forward", "backward", "optimizer", "hooks"} <= found["parts"].keys()
    assert Path(found["trace"]).is_file()
    assert not [*tmp_path.rglob("manifest.json"), *tmp_path.rglob("report.html")]
    text = stratagem("profile", config, "--steps", "1", "--skip", "1").out
    assert text.splitlines()[1].split() == ["part", "of", "an", "iteration", "time", "share"]
    assert "open it on https://ui.perfetto.dev" in text


@pytest.mark.slow
def test_a_training_that_is_too_short_for_a_profile_is_an_error(stratagem: Callable[..., Any], config: str) -> None:
    """The message contains the options to change."""
    found = stratagem("profile", config, "--skip", "50")
    assert found.status == 2
    assert "The training ended before 61 optimizer steps. Reduce --steps or --skip" in found.err


@pytest.mark.slow
def test_an_interrupted_profile_leaves_no_trace(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """After Ctrl-C in the third iteration, there is neither a checkpoint nor a log."""
    hooks = "custom_hooks=[{'type': 'PressCtrlC', 'after': 3}]"
    found = stratagem("profile", config, "--work-dir", tmp_path / "profile", "--set", hooks)
    assert found.status != 0
    assert not (tmp_path / "profile").exists()
