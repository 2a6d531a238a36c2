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


def test_options_are_written_to_the_script(stratagem: Callable[..., Any], config: str) -> None:
    """The script contains the nodes, one rank per accelerator, the time, and the options to save and requeue."""
    options = ("--nodes", 2, "--gpus-per-node", 8, "--time", "2-00", "--partition", "big", "--sbatch", "--qos=long")
    outcome = stratagem("submit", config, *options, "--set", "vars.note=a b", "--print")
    assert outcome.status == 0, outcome.err
    directives = set(re.findall(r"^#SBATCH (.*)$", outcome.out, re.M))
    assert {"--nodes=2", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=2-00"} < directives
    assert {"--partition=big", "--qos=long", "--requeue", "--signal=B:USR1@120"} < directives
    assert re.search(
        r"^srun .* train .*toy_config.py --set 'vars.note=a b' .* --launcher slurm --resume &$", outcome.out, re.M
    )


@pytest.mark.slow
def test_printing_writes_nothing(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """`--print` prints the script and writes no file."""
    assert stratagem("submit", config, "--print").out.startswith("#!/bin/bash\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_script_is_written_to_the_run_folder(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """Without --now, the script is written to the run folder, and the command to submit it is printed."""
    outcome = stratagem("submit", config, "--work-dir", "run")
    file = tmp_path / "run" / "toy_config.sbatch"
    assert f"--output={tmp_path}/run/slurm-%j.out" in file.read_text()
    assert f"sbatch {file}" in outcome.out


@pytest.mark.slow
def test_without_accelerators_there_is_one_rank_per_node(stratagem: Callable[..., Any], config: str) -> None:
    """Without accelerators, there is one rank per node, or the given number."""
    out = stratagem("submit", config, "--nodes", 3, "--print").out
    assert "--ntasks-per-node=1\n" in out
    assert "gpus" not in out
    assert "--ntasks-per-node=4\n" in stratagem("submit", config, "--tasks-per-node", 4, "--print").out


def test_cores_reach_the_step(stratagem: Callable[..., Any], config: str) -> None:
    """The script exports the number of cores, because SLURM does not pass it from the job to srun."""
    out = stratagem("submit", config, "--cpus-per-task", 4, "--print").out
    assert "#SBATCH --cpus-per-task=4\n" in out
    assert "export SRUN_CPUS_PER_TASK=" in out


@pytest.mark.slow
def test_an_error_is_found_before_submission(stratagem: Callable[..., Any], config: str, tmp_path: Path) -> None:
    """A configuration that training would reject is rejected before submission."""
    outcome = stratagem("submit", config, "--set", "train_cfg.max_epoch=3")
    assert outcome.status == 2
    assert "max_epochs" in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_submitting_without_slurm(stratagem: Callable[..., Any], config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sbatch, the script is written, and the error states where to submit it."""
    monkeypatch.setenv("PATH", "/nowhere")
    outcome = stratagem("submit", config, "--now")
    assert outcome.status == 2
    assert "sbatch is not installed" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--time", "soon", "days-hours"),
        ("--time", "2", "is 120 s, but the ranks start saving 120 s before"),
        ("--partition", "big\n#SBATCH --uid=0", "is not allowed in a batch script"),
        ("--sbatch", "qos=long", "--sbatch=--qos=long"),
    ],
)
def test_invalid_slurm_options(
    stratagem: Callable[..., Any], config: str, option: str, value: str, expected: str
) -> None:
    """Invalid SLURM options raise errors with a suggestion."""
    outcome = stratagem("submit", config, f"{option}={value}", "--print")
    assert outcome.status == 2
    assert expected in outcome.err


@given(st.integers(0, 60), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_all_formats_of_a_time_limit(days: int, hours: int, minutes: int, seconds: int) -> None:
    """All six formats of SLURM's time limit are parsed."""
    day, hour, minute = 86_400, 3600, 60
    assert seconds_of(f"{minutes}") == minutes * minute
    assert seconds_of(f"{minutes}:{seconds:02}") == minutes * minute + seconds
    assert seconds_of(f"{hours}:{minutes:02}:{seconds:02}") == hours * hour + minutes * minute + seconds
    assert seconds_of(f"{days}-{hours}") == days * day + hours * hour
    assert seconds_of(f"{days}-{hours}:{minutes}") == days * day + hours * hour + minutes * minute
    whole = days * day + hours * hour + minutes * minute + seconds
    assert seconds_of(f"{days}-{hours}:{minutes}:{seconds}") == whole


def test_the_time_to_save_is_limited_by_the_time_limit() -> None:
    """The time reserved for saving must be below the time limit; ten minutes fit into an hour, but not into ten minutes."""
    Allocation(nodes=1, gpus_per_node=0, time="1:00:00", save_before_s=600)
    with pytest.raises(ConfigValueError, match="--save-before"):
        Allocation(nodes=1, gpus_per_node=0, time="10", save_before_s=600)
