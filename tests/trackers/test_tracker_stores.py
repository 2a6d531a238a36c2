"""The stores of trackers contain each iteration of a run once, however its sessions ended."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb

from stratagem.train.trackers import TrackedRecord, TrackedRun, TrackingEnd
from stratagem.train.trackers import mlflow as mlflow_module
from stratagem.train.trackers.mlflow import MLflowTracker
from stratagem.train.trackers.tracker import EndState
from stratagem.train.trackers.wandb import WandbTracker
from tests.trackers.stores import STORES
from tests.trackers.tracked_job import SECRET

pytestmark = [pytest.mark.trackers, pytest.mark.slow]

JOB = Path(__file__).with_name("tracked_job.py")
ALL_STORES = pytest.mark.parametrize("store", list(STORES))
Job = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, which is also the home directory."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def train(folder: Path) -> Job:
    """Return a function that trains in a process without access to the configuration of the user."""
    environment = {
        **os.environ,
        "HOME": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_ERROR_REPORTING": "false",
        "OMP_NUM_THREADS": "1",
    }

    def run(name: str, *how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(JOB), str(folder / name), *how]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    return run


@pytest.fixture(scope="module")
def resumed(folder: Path, train: Job) -> Path:
    """A run that was killed in iteration 13, after the checkpoint and the validation of iteration 8, and then resumed."""
    killed = train("resumed", "kill", "13")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for read in STORES.values():
        # Otherwise there would be nothing to remove.
        assert read(folder / "resumed").steps["train/loss"][-1:] == [12]
    again = train("resumed", "resume")
    assert again.returncode == 0, again.stderr
    # Trackers print nothing to standard output: it belongs to the program, and they would interrupt the progress bar.
    assert json.loads(again.stdout).keys() == {"accuracy"}
    return folder / "resumed"


@ALL_STORES
def test_a_run_killed_and_resumed_has_each_iteration_once(resumed: Path, store: str) -> None:
    """The resumed session continues the same tracked run; the iterations after the checkpoint are replaced."""
    stored = STORES[store](resumed)
    assert stored.runs == 1
    every_second = list(range(2, 25, 2))
    for name in ("train/loss", "train/lr/group_0", "train/lr/group_1", "train/time"):
        assert stored.steps[name] == every_second
    assert stored.steps["val/accuracy"] == [8, 16, 24]


@ALL_STORES
def test_the_summary_has_the_outcome_and_the_best_value(resumed: Path, store: str) -> None:
    """The summary of the last session is stored."""
    stored = STORES[store](resumed)
    assert stored.outcome == "complete"
    manifests = [json.loads(path.read_text()) for path in resumed.glob("best_accuracy_*/manifest.json")]
    scores = [float(score) for score in re.findall(r'"score": ([0-9.]+)', json.dumps(manifests))]
    assert stored.best == pytest.approx(max(scores))


@ALL_STORES
def test_the_configuration_is_stored_with_masked_secrets(resumed: Path, store: str) -> None:
    """The store has the configuration and the lineage, and not the secret."""
    text = STORES[store](resumed).text
    assert "SECRET:vars.api_token" in text
    assert "previous_session" in text
    assert "resumed_from" in text
    assert "seed" in text


def test_no_file_of_any_store_contains_the_secret(resumed: Path) -> None:
    """Databases, logs and event files do not contain the value of the secret."""
    files = [path for path in resumed.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.fixture(scope="module")
def stopped(folder: Path, train: Job) -> Path:
    """A run that SIGTERM stopped after iteration 10."""
    assert train("stopped", "stop", "10").returncode == 128 + signal.SIGTERM
    return folder / "stopped"


@pytest.fixture(scope="module")
def failed(folder: Path, train: Job) -> Path:
    """A run that raised an exception in iteration 5."""
    assert train("failed", "fail", "5").returncode == 1
    return folder / "failed"


@ALL_STORES
def test_a_signal_is_the_outcome_in_every_store(stopped: Path, store: str) -> None:
    """All values up to the signal are stored, and the run is marked as interrupted."""
    stored = STORES[store](stopped)
    assert stored.outcome == "stopped by SIGTERM"
    assert stored.steps["train/loss"] == [2, 4, 6, 8, 10]
    assert stored.status == {"wandb": 255, "mlflow": "KILLED"}.get(store)


@ALL_STORES
def test_an_exception_is_the_outcome_in_every_store(failed: Path, store: str) -> None:
    """All values before the exception are stored, and the run is marked as failed."""
    stored = STORES[store](failed)
    assert stored.outcome == "failed: RuntimeError: bad luck"
    assert stored.steps["train/loss"] == [2, 4]
    assert stored.status == {"wandb": 1, "mlflow": "FAILED"}.get(store)


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    """A run."""
    return TrackedRun(id="a1", name="run", work_dir=tmp_path, folder=tmp_path, config={"lr": 0.5}, facts={"host": "x"})


def record(iteration: int) -> TrackedRecord:
    """Return a training record."""
    return TrackedRecord(
        mode="train", epoch=1, iteration=iteration, updates=iteration, values={"train/loss": 1.0 / iteration}, time=7.0
    )


END = TrackingEnd(state=EndState.COMPLETE, outcome="complete", epoch=1, iteration=6)


@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy and alembic
def test_an_mlflow_store_without_deletion_continues_in_a_copy(run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow servers cannot remove values: the kept ones are copied to a new run, and the earlier one is deleted."""
    monkeypatch.setattr(mlflow_module, "_DATABASE", "none")
    tracker = MLflowTracker()
    tracker.prepare()
    tracker.start(run)
    for iteration in range(1, 7):
        tracker.log(record(iteration))
    tracker = MLflowTracker()
    tracker.start(replace(run, resumed_at=4))
    for iteration in range(5, 7):
        tracker.log(record(iteration))
    tracker.finish(END)
    client = mlflow.MlflowClient(f"sqlite:///{run.work_dir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("stratagem").experiment_id
    (active,) = client.search_runs([experiment])
    history = client.get_metric_history(active.info.run_id, "train/loss")
    assert [(each.step, each.value) for each in history] == [(i, 1.0 / i) for i in range(1, 7)]
    assert active.data.params == {"lr": "0.5"}
    assert client.get_run(active.data.tags["stratagem/replaces"]).info.lifecycle_stage == "deleted"


class FakeRun:
    """An online run that accepts everything."""

    url = "https://wandb.invalid/run"

    def __init__(self) -> None:
        self.config = self

    def update(self, *_: Any, **__: Any) -> None:
        """Accept a configuration."""

    def define_metric(self, *_: Any, **__: Any) -> None:
        """Accept a metric."""


@pytest.mark.parametrize("supported", [True, False])
def test_an_online_run_is_rewound_if_the_server_supports_it(
    run: TrackedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, supported: bool
) -> None:
    """The last row that remains is that of iteration 4. Without support, the run continues with a warning."""
    calls = []

    def init(**arguments: Any) -> FakeRun:
        calls.append({name: arguments.get(name) for name in ("id", "resume", "resume_from")})
        if not supported and "resume_from" in arguments:
            raise wandb.errors.CommError("rewind is not enabled")
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    WandbTracker().start(replace(run, resumed_at=4))
    rewound = {"id": None, "resume": None, "resume_from": "a1?_step=44"}
    continued = {"id": "a1", "resume": "allow", "resume_from": None}
    assert calls == ([rewound] if supported else [rewound, continued])
    assert ("cannot be rewound to iteration 4 (CommError: rewind is not enabled)" in caplog.text) is not supported
