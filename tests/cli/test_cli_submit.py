"""The batch script that `stratagem submit` writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratagem.cli.submit import Allocation, seconds_of
from stratagem.errors import ConfigValueError


def test_what_the_user_asks_for_stands_in_the_script(stratagem: Callable[..., Any], config: str) -> None:
    """Nodes, accelerators with a rank each, time, and the way to save and to come back."""
    asked = ("--nodes", 2, "--gpus-per-node", 8, "--time", "2-00", "--partition", "big", "--sbatch", "--qos=long")
    outcome = stratagem("submit", config, *asked, "--set", "vars.note=a b", "--print")
    assert outcome.status == 0, outcome.err
    directives = set(re.findall(r"^#SBATCH (.*)$", outcome.out, re.M))
    assert {"--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=2-00"} < directives
    assert {"--partition=big", "--qos=long", "--requeue", "--signal=B:USR1@120"} < directives
    assert re.search(
        r"^srun .* train .*toy_config.py --set 'vars.note=a b' .* --launcher slurm --resume &$", outcome.out, re.M
    )


def test_printing_writes_nothing(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """It is there to be looked at."""
    assert stratagem("submit", config, "--print").out.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


def test_the_script_goes_into_the_folder_of_the_run(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """Without --now nothing is submitted; the command that does it is shown."""
    outcome = stratagem("submit", config, "--work-dir", "run")
    file = tmp_path / "run" / "toy_config.sbatch"
    assert f"--output={tmp_path}/run/slurm-%j.out" in file.read_text()
    assert f"sbatch {file}" in outcome.out


def test_without_accelerators_there_is_a_rank_on_each_node(stratagem: Callable[..., Any], config: str) -> None:
    """Or as many as asked for; no accelerator is asked of SLURM."""
    out = stratagem("submit", config, "--nodes", 3, "--print").out
    assert "--ntasks-per-node=1\n" in out
    assert "gpus" not in out
    assert "--ntasks-per-node=4\n" in stratagem("submit", config, "--tasks-per-node", 4, "--print").out


def test_cores_reach_the_step(stratagem: Callable[..., Any], config: str) -> None:
    """SLURM does not hand the job's cores on to srun by itself."""
    out = stratagem("submit", config, "--cpus-per-task", 4, "--print").out
    assert "#SBATCH --cpus-per-task=4\n" in out
    assert "export SRUN_CPUS_PER_TASK=" in out


def test_a_mistake_is_found_before_the_queue(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """A configuration that training would refuse is refused now."""
    outcome = stratagem("submit", config, "--set", "train_cfg.max_epoch=3")
    assert outcome.status == 2
    assert "max_epochs" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_submitting_where_slurm_is_not(
    stratagem: Callable[..., Any], config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is written, and the error says where to submit it."""
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = stratagem("submit", config, "--now")
    assert outcome.status == 2
    assert "there is no sbatch here" in outcome.err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--time", "soon", "days-hours"),
        ("--time", "2", "is 120 s, and the ranks are told to save 120 s before"),
        ("--partition", "big\n#SBATCH --uid=0", "cannot stand in a batch script"),
        ("--sbatch", "qos=long", "--sbatch=--qos=long"),
    ],
)
def test_what_cannot_be_asked_of_slurm(
    stratagem: Callable[..., Any], config: str, option: str, value: str, told: str
) -> None:
    """It is refused with what to write instead."""
    outcome = stratagem("submit", config, f"{option}={value}", "--print")
    assert outcome.status == 2
    assert told in outcome.err


@given(st.integers(0, 60), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_every_form_of_a_time(days: int, hours: int, minutes: int, seconds: int) -> None:
    """SLURM writes a time limit in six forms."""
    day, hour, minute = 86_400, 3600, 60
    assert seconds_of(f"{minutes}") == minutes * minute
    assert seconds_of(f"{minutes}:{seconds:02}") == minutes * minute + seconds
    assert seconds_of(f"{hours}:{minutes:02}:{seconds:02}") == hours * hour + minutes * minute + seconds
    assert seconds_of(f"{days}-{hours}") == days * day + hours * hour
    assert seconds_of(f"{days}-{hours}:{minutes}") == days * day + hours * hour + minutes * minute
    whole = days * day + hours * hour + minutes * minute + seconds
    assert seconds_of(f"{days}-{hours}:{minutes}:{seconds}") == whole


def test_more_time_to_save_is_more_time_to_ask_for() -> None:
    """An hour is enough for ten minutes of saving, ten minutes are not."""
    Allocation(nodes=1, gpus_per_node=0, time="1:00:00", save_before_s=600)
    with pytest.raises(ConfigValueError, match="--save-before"):
        Allocation(nodes=1, gpus_per_node=0, time="10", save_before_s=600)
