"""Commands that list, compare and follow runs by what they have logged."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stratagem.cli.runs.metrics import metrics_of
from stratagem.report.collect import collect, find_runs
from stratagem.train.run.run_history import RECORD, Outcome, RunHistory, Session

Command = Callable[..., Any]


def write_run(
    work_dir: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    how: str | None = "complete",
    config: str = "lr = 0.1\n",
    session: str = "20260101_000000",
) -> Path:
    """Write the files of a session with these records; without an outcome if ``how`` is None. Return its folder."""
    folder = work_dir / session
    (folder / "vis_data").mkdir(parents=True)
    (folder / "vis_data" / "scalars.json").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    (folder / f"{session}.log").write_text("a line of the log\n")
    (work_dir / f"{session}.py").write_text(config)
    entry = Session(name=f"{work_dir.name}/{session}", epoch=0, iter=0, strategy="SingleDeviceStrategy", world_size=1)
    outcome = None if how is None else {"how": how, "epoch": 1, "iter": 4, "at": "2026-01-01 00:01:00"}
    record = {**RunHistory([entry]).as_meta(), "ending": outcome}
    (folder / RECORD).write_text(json.dumps(record))
    return folder


def losses(*values: float) -> list[dict[str, Any]]:
    """Return training records."""
    return [
        {"loss": value, "samples_per_second": 100.0, "mode": "train", "epoch": 1, "iter": number, "step": number}
        for number, value in enumerate(values, start=1)
    ]


def accuracies(*values: float) -> list[dict[str, Any]]:
    """Return validation records."""
    return [
        {"accuracy": value, "mode": "val", "epoch": number, "iter": number, "step": number}
        for number, value in enumerate(values, start=1)
    ]


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[str, str]:
    """The paths of two runs with different losses, accuracies and configurations."""
    write_run(tmp_path / "all" / "first", [*losses(4, 3, 2, 1), *accuracies(0.5, 0.75, 0.5)])
    write_run(
        tmp_path / "all" / "second", losses(4, 2), config="lr = 0.2\n", how="failed: ValueError: no",
        session="20260102_000000",
    )  # fmt: skip
    return str(tmp_path / "all" / "first"), str(tmp_path / "all" / "second")


@pytest.mark.slow
def test_ls_lists_the_metrics_of_runs(stratagem: Command, two_runs: tuple[str, str], tmp_path: Path):
    """`runs ls --metrics` has a row for each run, in the order of their starts, with the last and the best values."""
    listed = stratagem("runs", "ls", tmp_path / "all", "--metrics")
    assert listed.status == 0
    heading, first, second = (line.split() for line in listed.out.splitlines())
    assert heading[-2:] == ["train/loss", "val/accuracy"]
    assert first == ["first", "complete", "4", "100", "1", "0.5", "(best", "0.75)"]
    assert second[:4] == ["second", "failed:", "ValueError:", "no"]
    found = json.loads(stratagem("runs", "ls", tmp_path / "all", "--metrics", "--json").out)
    assert found[0]["metrics"]["val/accuracy"] == {"last": 0.5, "best": 0.75, "best_at": 2}
    assert (found[1]["run"], found[1]["iter"], found[1]["speed"]) == ("second", 2, {"samples_per_second": 100.0})


def test_the_best_of_equal_values_is_the_first(tmp_path: Path):
    """The best iteration is the first one with the best value; a metric whose rule is unknown has no best value."""
    records = [*accuracies(0.5, 0.75, 0.75), {"other": 1.0, "mode": "val", "epoch": 1, "iter": 1, "step": 1}]
    write_run(tmp_path / "run", records)
    found = {each.name: each for each in metrics_of(collect(tmp_path / "run"))}
    assert (found["val/accuracy"].best, found["val/accuracy"].best_at) == (0.75, 2)
    assert (found["val/other"].last, found["val/other"].best) == (1.0, None)


@pytest.mark.slow
def test_compare_prints_results_and_configurations_side_by_side(
    stratagem: Command, two_runs: tuple[str, str], tmp_path: Path
):
    """Differing values of the configuration are listed, and the curves are plotted, also into a file."""
    done = stratagem("runs", "compare", *two_runs, "--out", tmp_path / "curves.png")
    assert done.status == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert ["results", "first", "second"] in lines
    assert ["train/loss", "1", "2"] in lines
    assert ["val/accuracy,", "best", "0.75"] in lines
    assert ["lr", "0.1", "0.2"] in lines
    assert "train/loss  ● first  ● second" in done.out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(stratagem("runs", "compare", *two_runs, "--json").out)
    assert found["runs"] == ["first", "second"]
    assert found["configuration"] == {"lr": ["0.1", "0.2"]}
    assert found["results"]["iterations"] == [4, 2]


@pytest.mark.slow
def test_compare_rejects_unknown_values_and_single_runs(stratagem: Command, two_runs: tuple[str, str]):
    """An unknown value is an error that suggests a known one, and so is a single run."""
    unknown = stratagem("runs", "compare", *two_runs, "--metric", "train/los")
    assert unknown.status != 0
    assert "no run has logged this value" in unknown.err
    assert "train/loss" in unknown.err
    assert "needs two or more runs, got 1" in stratagem("runs", "compare", two_runs[0]).err


@pytest.mark.slow
def test_runs_with_equal_names_are_told_apart(stratagem: Command, tmp_path: Path):
    """If work directories have the same name, their paths are printed."""
    for parent in ("a", "b"):
        write_run(tmp_path / parent / "run", losses(2, 1))
    done = stratagem("runs", "compare", "a/run", "b/run", "--json")
    assert json.loads(done.out)["runs"] == ["a/run", "b/run"]


@pytest.mark.slow
def test_a_curve_ends_where_its_run_ends(stratagem: Command, tmp_path: Path):
    """In the plot, the curve of a shorter run does not continue to the end of the longer one."""
    write_run(tmp_path / "long", losses(*[1.0] * 11))
    write_run(tmp_path / "short", losses(*[2.0] * 6))
    done = stratagem("runs", "compare", "long", "short", "--metric", "train/loss")
    rows = [line.rstrip() for line in done.out.splitlines() if "┤" in line]
    # The short run at the top, the long one at the bottom.
    assert rows[0].lstrip().startswith("2 ┤")
    assert len(rows[0]) - 13 == pytest.approx((len(rows[-1]) - 13) / 2, abs=2)


@pytest.mark.slow
def test_watch_follows_a_run_until_it_ends(stratagem: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a pipe, `watch` prints the last lines of the log, then what is appended, and how the session ended."""
    folder = write_run(tmp_path / "run", losses(2), how=None)
    (tmp_path / "run" / ".training.json").write_text("{}")
    steps = iter(range(3))

    def append(_seconds: float) -> None:
        step = next(steps)
        if step < 2:
            with (folder / f"{folder.name}.log").open("a") as log:
                log.write(f"line {step}\nhalf of a")
            with (folder / f"{folder.name}.log").open("a") as log:
                log.write(" line\n")
        else:
            history = RunHistory.from_meta(json.loads((folder / RECORD).read_text()))
            record = {**history.as_meta(), "ending": vars_of(Outcome.now("failed: OSError: x", epoch=1, iteration=4))}
            (folder / RECORD).write_text(json.dumps(record))

    monkeypatch.setattr("stratagem.cli.runs.watch.time.sleep", append)
    done = stratagem("watch", "run")
    assert done.out.splitlines() == [
        "a line of the log", "line 0", "half of a line", "line 1", "half of a line", "run: failed: OSError: x."
    ]  # fmt: skip
    assert done.status == 1


def vars_of(outcome: Outcome) -> dict[str, Any]:
    """Return the fields of an outcome."""
    return {name: getattr(outcome, name) for name in ("how", "epoch", "iter", "at")}


@pytest.mark.slow
def test_watch_prints_the_state_once(stratagem: Command, two_runs: tuple[str, str]):
    """`--once` prints the last records and the loss; a finished run is a success, a failed one is not."""
    state = json.loads(stratagem("watch", two_runs[0], "--once", "--json").out)
    assert (state["run"], state["state"]) == ("first", "complete")
    assert state["last"]["train"]["loss"] == 1
    assert state["last"]["val"]["accuracy"] == 0.5
    shown = stratagem("watch", two_runs[0], "--once")
    assert "accuracy: 0.5" in shown.out
    assert "train/loss" in shown.out
    assert stratagem("watch", two_runs[0]).status == 0
    assert stratagem("watch", two_runs[1]).status == 1


@pytest.mark.slow
def test_predictions_after_a_run_are_not_sessions_of_it(stratagem: Command, two_runs: tuple[str, str]):
    """The folder of a later test or prediction, which has no record, does not change the state and the metrics of the run."""
    later = Path(two_runs[0]) / "20260103_000000"
    (later / "vis_data").mkdir(parents=True)
    (later / "vis_data" / "scalars.json").write_text("")
    (row,) = json.loads(stratagem("runs", "ls", two_runs[0], "--metrics", "--json").out)
    assert (row["state"], row["iter"]) == ("complete", 4)
    assert json.loads(stratagem("watch", two_runs[0], "--once", "--json").out)["state"] == "complete"
    assert len(collect(Path(two_runs[0])).sessions) == 1
    assert [each.folder for each in collect(later).sessions] == [later]


def test_a_killed_run_is_not_followed_forever(stratagem: Command, tmp_path: Path):
    """A session without an outcome, whose lock is older than a minute, was killed."""
    write_run(tmp_path / "run", losses(2), how=None)
    lock = tmp_path / "run" / ".training.json"
    lock.write_text("{}")
    os.utime(lock, (time.time() - 120,) * 2)
    done = stratagem("watch", "run")
    assert (done.status, done.out.splitlines()[-1]) == (1, "run: killed.")


def test_watch_follows_the_run_that_wrote_last(stratagem: Command, two_runs: tuple[str, str], tmp_path: Path):
    """For a folder of several runs, `watch` chooses the one whose values are the newest."""
    assert [path.name for path in find_runs(tmp_path / "all")] == ["first", "second"]
    newest = tmp_path / "all" / "first" / "20260101_000000"
    for path in (newest, newest / "vis_data" / "scalars.json"):
        os.utime(path, (time.time() + 60,) * 2)
    assert json.loads(stratagem("watch", "all", "--once", "--json").out)["run"] == "first"


@pytest.mark.slow
def test_no_run_is_an_error(stratagem: Command, tmp_path: Path):
    """A folder without runs is an error for each of the commands."""
    for words in (("watch",), ("runs", "ls", "--metrics")):
        done = stratagem(*words, str(tmp_path))
        assert done.status != 0
        assert "No run found in" in done.err


@pytest.mark.slow
def test_a_work_directory_with_only_tests_contains_no_run(stratagem: Command, tmp_path: Path) -> None:
    """The folders of tests and validations, which have no record of a session, are not a run that was killed."""
    for session, mode in (("20260101_000000", "test"), ("20260101_000001", "val")):
        folder = write_run(tmp_path / "tested", [{"accuracy": 0.5, "mode": mode}], session=session)
        (folder / RECORD).unlink()
    assert find_runs(tmp_path) == []
    write_run(tmp_path / "trained", losses(1.0))
    done = stratagem("runs", "ls", tmp_path, "--metrics", "--json")
    assert [each["run"] for each in json.loads(done.out)] == ["trained"]


def test_a_training_of_an_earlier_version_is_a_run(tmp_path: Path) -> None:
    """Its folder has no record either, but values of the training, which had no mode."""
    folder = write_run(tmp_path / "old", [{"loss": 1.0, "step": 1}, {"accuracy": 0.5, "mode": "val"}])
    (folder / RECORD).unlink()
    assert find_runs(tmp_path) == [tmp_path / "old"]
