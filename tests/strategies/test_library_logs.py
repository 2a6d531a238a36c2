"""Messages of the library are written to the log of the run."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from stratagem import SingleDeviceStrategy


def log_of(strategy: SingleDeviceStrategy) -> str:
    """Return the text of the strategy's log file."""
    return (Path(strategy.log_dir) / f"{strategy.timestamp}.log").read_text()


def test_the_table_of_parameter_groups_is_logged(tmp_path: Path) -> None:
    """With paramwise_cfg, the log contains the options and some names of each parameter group."""
    strategy = SingleDeviceStrategy(work_dir=tmp_path, env_kwargs={"launcher": "none"})
    optim = {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.1}, "paramwise_cfg": {"bias_decay_mult": 0.0}}
    strategy.prepare(torch.nn.Linear(2, 3), optim_wrapper=optim)
    strategy.close()
    rows = [line.split() for line in log_of(strategy).splitlines()]
    assert ["weight_decay=0.0", "1", "3", "bias"] in rows


def test_a_closed_strategy_restores_the_logger(tmp_path: Path) -> None:
    """``close`` restores the handlers and the level of the library's logger."""
    library = logging.getLogger("stratagem")
    before = (list(library.handlers), library.level)
    strategy = SingleDeviceStrategy(work_dir=tmp_path, env_kwargs={"launcher": "none"})
    assert len(library.handlers) == len(before[0]) + 1
    strategy.close()
    strategy.close()
    assert (list(library.handlers), library.level) == before
