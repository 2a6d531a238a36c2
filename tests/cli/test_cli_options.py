"""Command-line options override the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratagem.cli.options import RunOptions, read_config


@pytest.mark.parametrize(
    ("written", "options"),
    [("", {"tp": 2}), ("FSDPStrategy", {"tp": 2, "replicate": 2}), ("DDPStrategy", {})],
    ids=["none", "the same", "another"],
)
def test_a_strategy_keeps_its_own_options(tmp_path: Path, written: str, options: dict[str, int]) -> None:
    """--strategy keeps options of the same strategy and those set on the command line, but not of a different one."""
    file = tmp_path / "config.py"
    file.write_text(f"strategy = dict(type={written!r}, replicate=2)\n" if written else "", encoding="utf-8")
    config = read_config(RunOptions(config=file, strategy="fsdp", overrides=("strategy.tp=2",)))
    assert config.strategy.to_dict() == {"type": "FSDPStrategy", **options}
