"""The examples in the README work."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from stratagem.config import Config, check
from stratagem.config_schema import SECTIONS

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
def test_the_python_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python example runs and trains a model to classify points inside a circle."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    runner = names["runner"]
    assert runner.run.metrics["accuracy"] > 0.9  # type: ignore[attr-defined]
    runner.close()  # type: ignore[attr-defined]


def test_the_configuration_passes_its_check(tmp_path: Path) -> None:
    """The check of the configuration example reports no problems."""
    shutil.copy(ROOT / "examples" / "mnist" / "digits.py", tmp_path)
    file = tmp_path / "config.py"
    file.write_text(BLOCKS[1], encoding="utf-8")
    assert check(Config.fromfile(file), SECTIONS) == []


def test_a_strategy_supports_a_custom_training_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example without a Runner is complete: it trains the network and saves a checkpoint."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(BLOCKS[2], "README.md", "exec"), names)
    torch.manual_seed(0)
    torch.rand(512, 2)
    untrained = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    network = names["network"]
    assert isinstance(network, torch.nn.Sequential)
    assert not torch.equal(network[0].weight, untrained[0].weight)
    assert (tmp_path / "work_dirs" / "by_hand" / "done" / "model.safetensors").is_file()
