"""`stratagem plan` shares many strategies between processes, with the same plans and no work lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stratagem import Config
from stratagem.cli.options import RunOptions
from stratagem.cli.plan import processes
from stratagem.cli.plan.processes import PlanSource, TaskPlanner
from stratagem.cli.progress_line import ProgressLine
from stratagem.planning.planner import plan_config
from stratagem.planning.result import StepPlan
from stratagem.planning.tasks import tasks_of
from tests.support.ranks import scripts_environment

# With ``ends_others``, the model ends every process that another one started.
_MODEL = """
import multiprocessing, os
from torch import nn
from stratagem import MODELS

@MODELS.register_module()
class Small(nn.Sequential):
    def __init__(self, ends_others=False):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        if ends_others and multiprocessing.parent_process() is not None:
            os._exit(9)
"""
_CONFIG = """
custom_imports = dict(imports=["planned_parts"])
model = dict(type="SupervisedModel", network=dict(type="Small"), loss=dict(type="MSELoss"))
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=0.01))
"""
BATCH = "float32[2,4],float32[2,2]"
STRATEGIES = ("ddp", "fsdp", "deepspeed")
WORLDS = (2, 4)


@pytest.fixture
def source(tmp_path: Path) -> PlanSource:
    """Two strategies of torch and an engine, from a configuration with a module of its own."""
    (tmp_path / "planned_parts.py").write_text(_MODEL, encoding="utf-8")
    path = tmp_path / "planned.py"
    path.write_text(_CONFIG, encoding="utf-8")
    return PlanSource(options=RunOptions(config=path), gpus_per_node=8, memory=(2**30,))


def planned(source: PlanSource, number: int) -> list[StepPlan]:
    """Return the plans of a number of processes, without the time that they took."""
    found = plan_config(
        Config.fromfile(source.options.config),
        strategies=STRATEGIES,
        worlds=WORLDS,
        memory=source.memory,
        batch=BATCH,
        plan_all=TaskPlanner(source, ProgressLine(0, quiet=False), number),
    )
    return [replace(step, seconds=0.0) for step in found.steps]


@pytest.mark.slow
def test_two_processes_plan_the_same_as_one(source: PlanSource, capsys: pytest.CaptureFixture[str]) -> None:
    """All sizes are equal, and the progress names each strategy and number of ranks once."""
    alone = planned(source, 1)
    expected = [f"{each.label}, {each.world} ranks" for each in alone]
    assert [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()] == expected
    assert planned(source, 2) == alone
    assert all(each.failure is None and each.refusal is None for each in alone)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == [f"[{number}/6]" for number in range(1, 7)]
    assert sorted(line.split("] ")[1] for line in lines) == sorted(expected)


@pytest.mark.slow
def test_what_a_killed_process_has_not_planned_is_planned_here(source: PlanSource) -> None:
    """A process that ends without an answer costs time, but no plan."""
    path = source.options.config
    path.write_text(_CONFIG.replace('type="Small"', 'type="Small", ends_others=True'), encoding="utf-8")
    found = planned(source, 2)
    assert [(each.label, each.world) for each in found] == [
        (label, world) for label in ("DDP", "FSDP", "DeepSpeed") for world in WORLDS
    ]
    assert all(each.memory.parameters for each in found)


def test_a_batch_that_cannot_be_sent_is_planned_in_one_process() -> None:
    """An object of the user's batch may refer to anything, such as to a function without a name."""
    assert processes._can_be_sent({"tokens": [1, 2]})
    assert not processes._can_be_sent({"transform": lambda value: value})


def test_engines_share_a_process() -> None:
    """Their strategies use the same simulations, so they are planned together; the others one by one."""
    tasks = tasks_of(("ddp", "deepspeed", "fsdp", "colossalai"), (2, 4))
    assert processes._groups(list(tasks)) == [[2, 3, 6, 7], [0], [1], [4], [5]]


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_without_a_traceback(source: PlanSource) -> None:
    """It comes while the second process imports its modules."""
    words = ["plan", str(source.options.config), "--strategy", ",".join(STRATEGIES), "--world", "2,4", "--batch", BATCH]
    with subprocess.Popen(
        [sys.executable, "-m", "stratagem", *words],
        cwd=source.options.config.parent,
        env=scripts_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as command:
        assert command.stderr is not None
        assert command.stderr.readline().startswith("[1/6] ")
        time.sleep(1)  # by when the second process imports torch on most machines
        os.killpg(command.pid, signal.SIGINT)
        # Reading ends when no process can write to the pipes any more.
        _, errors = command.communicate(timeout=60)
    assert command.returncode == 130
    assert "Traceback" not in errors
