"""Tests of the short names of strategies in Python and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stratagem import Runner
from stratagem.config import Config
from stratagem.config_schema import check_run
from stratagem.errors import ConfigKeyError
from tests.support.ranks import Ranks
from tests.train.toys import settings


@pytest.mark.parametrize("strategy", ["single", "Single", "SingleDeviceStrategy", {"type": "single"}])
def test_a_runner_accepts_the_short_name_of_a_strategy(tmp_path: Path, strategy: Any):
    """The short name, in any case and in a configuration with options, gives the same strategy as its class name."""
    runner = Runner(**settings(work_dir=tmp_path, strategy=strategy))
    runner.close()
    assert type(runner.strategy).__name__ == "SingleDeviceStrategy"
    assert check_run(Config(settings(strategy=strategy))) == []


@pytest.mark.parametrize("strategy", ["dpp", {"type": "dpp"}])
def test_an_unknown_name_lists_the_short_names(tmp_path: Path, strategy: Any):
    """Building the run and the check of a configuration raise the same error, which contains the short names."""
    with pytest.raises(ConfigKeyError, match="strategy: unknown name 'dpp'. Did you mean 'ddp'") as raised:
        Runner(**settings(work_dir=tmp_path, strategy=strategy))
    problems = check_run(Config(settings(strategy=strategy)))
    assert [str(raised.value) in problem.message for problem in problems] == [True]


def name_on_rank(folder: str, strategy: str) -> str:
    """Return the name of the class of a strategy that a runner builds on this rank."""
    runner = Runner(**settings(work_dir=folder, strategy=strategy))
    runner.close()
    return type(runner.strategy).__name__


def test_short_names_on_two_ranks(ranks: Ranks, tmp_path: Path):
    """``"ddp"`` and ``"fsdp"`` give the strategies for several processes."""
    assert ranks.run(name_on_rank, str(tmp_path), "ddp") == ["DDPStrategy"] * 2
    assert ranks.run(name_on_rank, str(tmp_path), "fsdp") == ["FSDPStrategy"] * 2
