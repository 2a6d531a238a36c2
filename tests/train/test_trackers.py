"""Trackers that write files, and what a resumed run removes from them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stratagem import Config
from stratagem.config_schema import check_run
from stratagem.errors import ConfigTypeError, ConfigValueError, MissingDependencyError
from stratagem.train.trackers import TrackedRecord, TrackedRun, Tracker, TrackingEnd, packages
from stratagem.train.trackers.building import build_trackers
from stratagem.train.trackers.csv_file import CSVTracker
from stratagem.train.trackers.tensorboard import TensorBoardTracker
from stratagem.train.trackers.tracker import EndState
from stratagem.train.trackers.wandb_log import TransactionLogWriter, read_transaction_log


@pytest.fixture
def run(tmp_path: Path) -> TrackedRun:
    """A new run."""
    return TrackedRun(
        id="a1", name="run", work_dir=tmp_path, folder=tmp_path / "first", config={"lr": 0.5}, facts={"host": "here"}
    )


def record(mode: str, iteration: int, values: Mapping[str, float]) -> TrackedRecord:
    """Return a record."""
    return TrackedRecord(mode=mode, epoch=1, iteration=iteration, updates=iteration, values=values, time=7.0)


def end(iteration: int) -> TrackingEnd:
    """Return the end of a session."""
    return TrackingEnd(
        state=EndState.COMPLETE, outcome="complete", epoch=1, iteration=iteration, best={"val/accuracy": 0.75}
    )


def log_iterations(tracker: Tracker, iterations: range) -> None:
    """Log the loss of each iteration, and an accuracy after every fourth."""
    for iteration in iterations:
        tracker.log(record("train", iteration, {"train/loss": float(iteration)}))
        if iteration % 4 == 0:
            tracker.log(record("val", iteration, {"val/accuracy": 0.75}))


def rows(run: TrackedRun) -> list[dict[str, str]]:
    """Return the rows of the CSV file."""
    with (run.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def places(run: TrackedRun) -> list[tuple[str, int]]:
    """Return the mode and the iteration of each row of the CSV file."""
    return [(row["mode"], int(row["iter"])) for row in rows(run)]


def test_a_csv_file_has_a_row_for_each_record(run: TrackedRun) -> None:
    """Rows have the position and the values; a value that appears later adds a column, also with a comma in its name."""
    tracker = CSVTracker()
    tracker.start(run)
    tracker.log(record("train", 2, {"train/loss": 0.1}))
    tracker.log(record("train", 4, {"train/loss": math.nan, "train/a,b": math.inf}))
    tracker.finish(end(4))
    assert rows(run) == [
        {"mode": "train", "epoch": "1", "iter": "2", "updates": "2", "time": "7.0", "train/loss": "0.1", "train/a,b": ""},
        {"mode": "train", "epoch": "1", "iter": "4", "updates": "4", "time": "7.0", "train/loss": "nan", "train/a,b": "inf"},
    ]  # fmt: skip


def test_the_description_next_to_a_csv_file_has_config_lineage_and_summary(run: TrackedRun) -> None:
    """``metrics.json`` lists the facts of each session, and the summary of the last one."""
    tracker = CSVTracker()
    tracker.start(run)
    tracker.finish(end(4))
    tracker.start(replace(run, facts={"host": "there"}, resumed_at=4))
    description = json.loads((run.folder / "metrics.json").read_text())
    assert description["end"] is None
    tracker.finish(end(8))
    description = json.loads((run.folder / "metrics.json").read_text())
    assert description["config"] == {"lr": 0.5}
    assert [(each["host"], each["resumed_at"]) for each in description["sessions"]] == [("here", None), ("there", 4)]
    assert description["end"] == {
        "outcome": "complete", "final_epoch": 1, "final_iter": 8, "best/val/accuracy": 0.75,
    }  # fmt: skip


@pytest.mark.parametrize("validated", [True, False])
def test_a_resumed_run_removes_later_rows_from_its_csv_file(run: TrackedRun, validated: bool) -> None:
    """Each record is in the file once. A validation that the checkpoint does not contain is repeated, so it is removed."""
    killed = CSVTracker()
    killed.start(run)
    log_iterations(killed, range(1, 7))
    tracker = CSVTracker()
    tracker.start(replace(run, resumed_at=4, validated=validated))
    assert places(run) == [*(("train", i) for i in range(1, 5)), *([("val", 4)] if validated else [])]
    log_iterations(tracker, range(5, 9))
    tracker.finish(end(8))
    assert [place for place in places(run) if place[0] == "train"] == [("train", i) for i in range(1, 9)]


def test_an_incomplete_last_row_is_removed_when_a_run_resumes(run: TrackedRun) -> None:
    """A process that is killed while it writes a row leaves a part of it."""
    killed = CSVTracker()
    killed.start(run)
    log_iterations(killed, range(1, 3))
    path = run.folder / "metrics.csv"
    path.write_bytes(path.read_bytes() + b"train,1,3,3,7")
    tracker = CSVTracker()
    tracker.start(replace(run, resumed_at=3))
    log_iterations(tracker, range(4, 5))
    assert places(run) == [("train", 1), ("train", 2), ("train", 4), ("val", 4)]


def steps(folder: Path, name: str) -> list[int]:
    """Return the steps of a scalar."""
    events = EventAccumulator(str(folder), purge_orphaned_data=False)
    events.Reload()
    return [event.step for event in events.Scalars(name)]


@pytest.mark.slow
@pytest.mark.parametrize("validated", [True, False])
def test_a_resumed_run_removes_later_values_from_event_files(run: TrackedRun, validated: bool) -> None:
    """The event files contain each value once, also for readers that do not interpret restarts."""
    killed = TensorBoardTracker()
    killed.start(run)
    log_iterations(killed, range(1, 7))
    folder = run.folder / "tensorboard"
    torn = next(folder.glob("events*"))
    torn.write_bytes(torn.read_bytes() + b"\x18\x00\x00")
    tracker = TensorBoardTracker()
    tracker.start(replace(run, resumed_at=4, validated=validated))
    assert steps(folder, "train/loss") == [1, 2, 3, 4]
    if not validated:
        tracker.log(record("val", 4, {"val/accuracy": 0.75}))
    log_iterations(tracker, range(5, 9))
    tracker.finish(end(8))
    assert steps(folder, "train/loss") == list(range(1, 9))
    assert steps(folder, "val/accuracy") == [4, 8]


@pytest.mark.parametrize("length", [0, 1, 32747, 32748, 32749, 32754, 32755, 32761, 65530, 100_000])
def test_transaction_logs_contain_the_records_that_were_written(tmp_path: Path, length: int) -> None:
    """Records of any length, also at the end of a block, are read as they were written, up to an incomplete one."""
    records = [bytes([7]) * length, b"second", bytes([1]) * length, b"last"]
    file = io.BytesIO()
    writer = TransactionLogWriter(file)
    for each in records:
        writer.write(each)
    path = tmp_path / "run.wandb"
    path.write_bytes(file.getvalue())
    assert list(read_transaction_log(path)) == records
    path.write_bytes(file.getvalue()[:-1])
    assert list(read_transaction_log(path)) == records[:-1]


class Silent(Tracker):
    """A tracker that stores nothing."""


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        (["cvs"], "'cvs' is not in the tracker registry. Did you mean 'csv'?"),
        ([{"type": "csv", "path": "x"}], "CSVTracker takes no argument 'path'."),
        ([{"type": "tensorboard", "foldr": "x"}], "Did you mean 'folder'?"),
        ([{"type": "csv", "queue_size": 0}], "queue_size must be an integer of at least 1, got 0."),
        ([{"type": "csv", "flush_s": "long"}], "flush_s must be a number of seconds, got 'long'."),
        (["csv", {"type": "csv"}], "there are two trackers 'csv'"),
        ({"type": "csv"}, "trackers must be a list"),
        ("csv", "trackers must be a list"),
    ],
)
def test_invalid_trackers_are_found_by_the_check(trackers: object, message: str) -> None:
    """A configuration with an unknown tracker or option is refused before the run starts."""
    problems = [str(each) for each in check_run(Config({"model": {"type": "Linear"}, "trackers": trackers}))]
    assert [message in each for each in problems if "trackers" in each] == [True]


@pytest.mark.parametrize(
    ("tracker", "argument"),
    [
        ("wandb", "entity: someone"),
        ("wandb", "settings: {base_url: 'https://other.invalid'}"),
        ("mlflow", "tracking_uri: 'https://other.invalid'"),
        ("trackio", "space_id: someone/else"),
        ("trackio", "server_url: 'https://other.invalid'"),
    ],
)
def test_a_data_file_cannot_choose_the_server_of_a_tracker(tmp_path: Path, tracker: str, argument: str) -> None:
    """A downloaded YAML file must not send the values of a run to a server or account of its author."""
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{type: Linear}}\ntrackers:\n- type: {tracker}\n  name: run\n  {argument}\n")
    (problem,) = (str(each) for each in check_run(Config.fromdata(file)) if each.key == "trackers")
    assert f"a data file cannot set {argument.partition(':')[0]!r}" in problem


def test_trackers_can_be_names_configurations_and_objects() -> None:
    """The common options are set on the tracker."""
    own = Silent()
    built = build_trackers(["csv", {"type": "tensorboard", "flush_s": 5, "queue_size": 10}, own])
    assert list(built) == ["csv", "tensorboard", "Silent"]
    assert (built["tensorboard"].flush_s, built["tensorboard"].queue_size, built["Silent"]) == (5, 10, own)


def test_the_same_tracker_twice_is_refused() -> None:
    """Two trackers of a kind would write to the same run."""
    with pytest.raises(ConfigValueError, match="there are two trackers 'csv'"):
        build_trackers(["csv", CSVTracker()])


def test_an_object_that_is_not_a_tracker_is_refused() -> None:
    """The message names the base class."""
    with pytest.raises(ConfigTypeError, match="Expected a subclass of stratagem.train.trackers.Tracker"):
        build_trackers([3])  # type: ignore[list-item]


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A tracker whose package is not installed is refused when the run is configured."""
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        MissingDependencyError, match=rf"{name} is not installed. Install it: pip install stratagem\[{name}\]"
    ):
        build_trackers([name])
