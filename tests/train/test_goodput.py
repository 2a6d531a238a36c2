"""Tests of goodput: where the wall time of a run went, over all its sessions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stratagem import Runner
from stratagem.train.goodput import clock as clock_module
from stratagem.train.goodput.account import Goodput, account, goodput_of, lineage_of, read_sessions
from stratagem.train.goodput.clock import SessionClock
from stratagem.train.goodput.recorder import TIMES
from stratagem.train.run.progress import Progress, StepTimer
from tests.train.spoiled import spoiled_settings
from tests.train.toys import QUIET_HOOKS, At, stop

ROOT = Path(__file__).parents[2]
MakeRunner = Callable[..., Runner]


class Line(NamedTuple):
    """A line of the log of a timed job."""

    at: float
    word: str
    number: int


def lines_of(log: Path) -> list[Line]:
    """Return the complete lines of the log of a timed job."""
    text = log.read_text() if log.exists() else ""
    words = (line.split() for line in text.splitlines())
    return [Line(float(at), word, int(number)) for at, word, number in words]


def run_job(work_dir: Path, log: Path, kill_at: tuple[str, int, float] | None) -> tuple[float, float]:
    """Start a timed job, and kill it some seconds after a line; return the times at which it began and ended."""
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    before = len(lines_of(log))
    began = ended = time.time()
    command = [sys.executable, "-m", "tests.train.timed_job", str(work_dir), str(log)]
    with subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
        while kill_at is not None and job.poll() is None:
            if any(line[1:] == kill_at[:2] for line in lines_of(log)[before:]):
                time.sleep(kill_at[2])
                job.kill()
                # The process executes nothing from now on, although the system needs time to remove it.
                ended = time.time()
                break
            time.sleep(0.005)
        job.wait(120)
        assert kill_at is not None or job.returncode == 0, job.stderr
    return began, ended


def spans(lines: Sequence[Line], word: str, end: float) -> list[tuple[float, float, int]]:
    """Return when each block with this name began and ended; the last one may have been ended by the kill."""
    found: list[tuple[float, float, int]] = []
    for line in lines:
        if line.word == f"{word}-begin":
            found.append((line.at, end, line.number))
        elif line.word == f"{word}-end":
            found[-1] = (found[-1][0], line.at, line.number)
    return found


def waits(lines: Sequence[Line]) -> list[float]:
    """Return the time before each step in which nothing else happened: the loop waited for a batch, or created its loader."""
    found, ready = [], 0.0
    for line in lines:
        if line.word in {"training", "step-end", "save-end", "validation-end"}:
            ready = line.at
        elif line.word == "step-begin":
            found.append(line.at - ready)
    return found


def true_times(lines: Sequence[Line], sessions: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Add up the known times, without the code under test.

    A session continues from the number in its line ``training``: steps from this number on in earlier sessions are repeated.
    """
    times: dict[str, float] = defaultdict(float)
    resumed_at = []
    for number, (began, ended) in enumerate(sessions):
        own = [line for line in lines if began <= line.at <= ended]
        resumed_at.append(next(line.number for line in own if line.word == "training"))
        times["start"] += next(line.at for line in own if line.word == "training") - began
        times["save"] += sum(end - begin for begin, end, _ in spans(own, "save", ended))
        times["evaluation"] += sum(end - begin for begin, end, _ in spans(own, "validation", ended))
        if number:
            times["restart"] += began - sessions[number - 1][1]
    for number, (began, ended) in enumerate(sessions):
        own = [line for line in lines if began <= line.at <= ended]
        first_lost = min([*resumed_at[number + 1 :], 10**9])
        for (begin, end, iteration), wait in zip(spans(own, "step", ended), waits(own), strict=True):
            if iteration >= first_lost:
                times["repeated"] += end - begin + wait
            else:
                times["train"] += end - begin
                times["data"] += wait
    times["wall"] = sessions[-1][1] - sessions[0][0]
    return dict(times)


@pytest.mark.slow
def test_the_goodput_of_a_run_killed_twice_equals_its_known_times(tmp_path: Path) -> None:
    """Killed in an iteration and inside a save, each part is within 2 % of the wall time of what the job wrote down."""
    work_dir, log = tmp_path / "run", tmp_path / "log"
    sessions = [run_job(work_dir, log, ("step-begin", 33, 0.02))]
    time.sleep(1.0)
    sessions.append(run_job(work_dir, log, ("sleep-in-save", 39, 0.25)))
    time.sleep(0.5)
    sessions.append(run_job(work_dir, log, None))
    # The interpreter needs some more time to exit after the training.
    sessions[-1] = sessions[-1][0], next(line.at for line in lines_of(log) if line.word == "end")
    truth = true_times(lines_of(log), sessions)
    goodput = goodput_of(work_dir)
    assert goodput is not None
    print("\n" + table(truth, goodput))  # noqa: T201
    assert goodput.sessions == 3
    assert goodput.wall == pytest.approx(truth["wall"], rel=0.02)
    limit = 0.02 * truth["wall"]
    for name, seconds in truth.items():
        if name != "wall":
            assert goodput.seconds[name] == pytest.approx(seconds, abs=limit), name
    assert goodput.share == pytest.approx(truth["train"] / truth["wall"], abs=0.02)
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall)
    # The sleeps alone, without any of the lines that the job wrote.
    assert goodput.seconds["train"] == pytest.approx(60 * 0.03, abs=limit + 60 * 0.005)
    assert goodput.seconds["save"] >= 3 * 0.4 + 0.2


def table(truth: dict[str, float], goodput: Goodput) -> str:
    """Return both as a table."""
    rows = {**goodput.seconds, "wall": goodput.wall}
    return "\n".join(f"{name:12} {truth.get(name, 0.0):8.3f} {seconds:8.3f}" for name, seconds in rows.items())


def write(work_dir: Path, name: str, *records: dict[str, Any], tail: str = "") -> None:
    """Write the recorded times of a session."""
    folder = work_dir / name
    folder.mkdir(parents=True)
    (folder / TIMES).write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def begin(at: float) -> dict[str, Any]:
    """Return the first record of a session."""
    return {"event": "begin", "time": at}


def session(run_id: str, iteration: int, *, start: float, continues: bool = False) -> dict[str, Any]:
    """Return the record of a prepared session."""
    return {
        "event": "session", "run_id": run_id, "continues": continues, "elapsed": start, "iter": iteration, "start": start,
    }  # fmt: skip


def record(event: str, iteration: int, **seconds: float) -> dict[str, Any]:
    """Return a record with the seconds of each phase."""
    return {"event": event, "iter": iteration, "elapsed": sum(seconds.values()), **seconds}


def test_training_after_the_checkpoint_of_a_killed_session_is_repeated_work(tmp_path: Path) -> None:
    """Iterations 11 to 15 took 10 s of 30 s and are trained again; 5 s pass between the sessions."""
    write(
        tmp_path, "1", begin(1000.0), session("a", 0, start=2.0), record("save", 10, start=2.0, train=16.0, data=4.0),
        record("saved", 10, start=2.0, train=16.0, data=4.0, save=1.0),
        record("time", 15, start=2.0, train=24.0, data=6.0, save=1.0),
    )  # fmt: skip
    write(
        tmp_path, "2", begin(1038.0), session("a", 10, start=2.0),
        record("end", 20, start=2.0, train=16.0, data=4.0) | {"outcome": "complete"},
    )  # fmt: skip
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert goodput.seconds == {
        "train": 32.0, "start": 4.0, "data": 8.0, "save": 1.0, "evaluation": 0.0, "restart": 5.0, "repeated": 10.0,
        "other": 0.0,
    }  # fmt: skip
    assert goodput.wall == 60.0


def test_records_before_a_session_is_resumed_have_no_iteration(tmp_path: Path) -> None:
    """While the second session starts, it has completed 0 iterations, which does not mean that the run begins again."""
    write(
        tmp_path, "1", begin(0.0), session("a", 0, start=1.0), record("save", 10, start=1.0, train=10.0),
        record("time", 15, start=1.0, train=15.0),
    )  # fmt: skip
    write(
        tmp_path, "2", begin(16.0), record("time", 0, start=1.0), session("a", 10, start=2.0),
        record("end", 20, start=2.0, train=10.0) | {"outcome": "complete"},
    )  # fmt: skip
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert (goodput.seconds["train"], goodput.seconds["repeated"]) == (20.0, 5.0)


def test_training_before_a_rollback_is_repeated_work(tmp_path: Path) -> None:
    """The run trained 30 s to iteration 30 and was rolled back to iteration 10, which it had reached after 10 s."""
    write(
        tmp_path, "1", begin(0.0), session("a", 0, start=0.0), record("save", 10, train=10.0),
        record("rolled back", 10, train=30.0), record("end", 20, train=40.0) | {"outcome": "complete"},
    )  # fmt: skip
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert (goodput.seconds["train"], goodput.seconds["repeated"]) == (20.0, 20.0)


def test_a_run_killed_before_its_first_checkpoint_has_lost_everything(tmp_path: Path) -> None:
    """The second session starts from scratch with another ID, but was configured to resume, so it continues the first."""
    write(tmp_path, "1", begin(0.0), session("a", 0, start=1.0), record("time", 5, start=1.0, train=9.0))
    write(
        tmp_path, "2", begin(10.0), session("b", 0, start=1.0, continues=True), record("time", 3, start=1.0, train=4.0)
    )
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert (goodput.sessions, goodput.seconds["train"], goodput.seconds["repeated"]) == (2, 4.0, 9.0)


def test_a_new_run_in_the_same_folder_has_its_own_goodput(tmp_path: Path) -> None:
    """A session that does not resume begins another run, and the folder of the first session still gives the first run."""
    write(tmp_path, "1", begin(0.0), session("a", 0, start=1.0), record("time", 5, start=1.0, train=9.0))
    write(tmp_path, "2", begin(50.0), session("b", 0, start=1.0), record("time", 5, start=1.0, train=3.0))
    first, second = goodput_of(tmp_path, tmp_path / "1"), goodput_of(tmp_path)
    assert first is not None
    assert second is not None
    assert (first.wall, second.wall) == (10.0, 4.0)


def test_a_pause_after_a_complete_session_is_not_a_restart(tmp_path: Path) -> None:
    """A run that was complete and is made longer days later has not lost these days."""
    ended = record("end", 10, train=10.0) | {"outcome": "complete"}
    write(tmp_path, "1", begin(0.0), session("a", 0, start=0.0), ended)
    write(tmp_path, "2", begin(90000.0), session("a", 10, start=0.0), record("end", 20, train=10.0))
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert (goodput.wall, goodput.share) == (20.0, 1.0)


def test_training_after_the_last_checkpoint_of_a_failed_run_does_not_count(tmp_path: Path) -> None:
    """A session that failed at iteration 20 has kept iteration 10."""
    write(
        tmp_path, "1", begin(0.0), session("a", 0, start=0.0), record("save", 10, train=10.0),
        record("saved", 10, train=10.0), record("end", 20, train=20.0) | {"outcome": "failed"},
    )  # fmt: skip
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert (goodput.seconds["train"], goodput.seconds["repeated"]) == (10.0, 10.0)


def test_damaged_lines_of_recorded_times_are_skipped(tmp_path: Path) -> None:
    """A line that the kill cut off, and lines that are not records, leave the totals of the last complete record."""
    write(
        tmp_path, "1", begin(0.0), session("a", 0, start=1.0), {"event": "time"}, record("time", 5, start=1.0, train=9.0),
        tail='[1]\n{"event": "time", "elap',
    )  # fmt: skip
    goodput = goodput_of(tmp_path)
    assert goodput is not None
    assert goodput.wall == 10.0


def test_a_session_killed_while_it_starts_belongs_to_the_run_that_starts_next(tmp_path: Path) -> None:
    """Its start-up is part of the run, and so is the time until the next session."""
    write(tmp_path, "1", begin(0.0), record("time", 0, start=3.0))
    write(tmp_path, "2", begin(5.0), session("a", 0, start=1.0), record("time", 5, start=1.0, train=4.0))
    sessions = read_sessions(tmp_path)
    assert len(lineage_of(sessions)) == 2
    assert account(sessions).seconds["start"] == 4.0
    assert account(sessions).seconds["restart"] == 2.0


def test_a_phase_inside_of_another_one_interrupts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """3 s of start-up, 10 s of training that waits 2 s for data and contains a save of 4 s, and 1 s of other time."""
    now = 100.0
    monkeypatch.setattr(clock_module, "perf_counter", lambda: now)
    timer = StepTimer()
    clock = SessionClock(timer, Progress(iter=7))
    now += 3
    clock.end_start_up()
    with clock.phase("train"):
        now += 5
        timer.data_seconds = 2.0
        timer.count = 1
        timer.pop_means()  # A log line does not change the times.
        with clock.phase("save"):
            now += 4
        now += 5
    now += 1
    reading = clock.read()
    assert (reading.elapsed, reading.iter) == (18.0, 7)
    assert reading.seconds == {"start": 3.0, "other": 1.0, "train": 8.0, "data": 2.0, "save": 4.0}


class SleepingLoop:
    """A loop of a user, which does not use the training functions of this package."""

    def __init__(self, run: Any, dataloader: Any, val_loop: Any, max_epochs: int = 1) -> None:
        self.run_, self.dataloader = run, dataloader
        run.progress.max_epochs = max_epochs

    def run(self) -> None:
        time.sleep(0.2)
        self.run_.progress.epoch = 1


def test_the_time_of_a_custom_loop_is_training(make_runner: MakeRunner) -> None:
    """A loop that does not measure its training does not have a goodput of 0."""
    runner = make_runner(train_cfg={"type": SleepingLoop})
    runner.train()
    goodput = goodput_of(Path(runner.strategy.work_dir))
    assert goodput is not None
    assert goodput.seconds["train"] >= 0.2


def events_of(runner: Runner) -> list[tuple[str, int]]:
    """Return the recorded events of a run and their iterations, without those at intervals."""
    text = (Path(runner.strategy.log_dir) / TIMES).read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return [(each["event"], each.get("iter", 0)) for each in records if each["event"] != "time"]


@pytest.mark.parametrize("background", [False, True])
def test_a_run_records_its_saves(make_runner: MakeRunner, background: bool) -> None:
    """A save is recorded before it begins and once it is durable, also if it is written in the background."""
    saving = {"by_epoch": False, "interval": 5, "async_save": background}
    runner = make_runner(default_hooks={**QUIET_HOOKS, "checkpoint": saving}, train_cfg={"max_iters": 10})
    runner.train()
    events = events_of(runner)
    if background:
        assert events.index(("saved", 5)) > events.index(("save", 5))
        events = [event for event in events if event[0] != "saved"]
        assert events == [("begin", 0), ("session", 0), ("save", 5), ("save", 10), ("end", 10)]
    else:
        assert events == [
            ("begin", 0), ("session", 0), ("save", 5), ("saved", 5), ("save", 10), ("saved", 10), ("end", 10),
        ]  # fmt: skip


def test_a_run_records_its_rollback(make_runner: MakeRunner) -> None:
    """The record of a rollback from iteration 6 contains the iteration of the checkpoint, 4."""
    hooks = {"nonfinite": {"policy": "rollback"}, "checkpoint": {"by_epoch": False, "interval": 4, "save_last": False}}
    arguments, _, _ = spoiled_settings({6: "nan"}, hooks=hooks, train_cfg={"max_epochs": 1})
    runner = make_runner(**arguments)
    runner.train()
    events = [event for event in events_of(runner) if event[0] not in {"save", "saved"}]
    assert events == [("begin", 0), ("session", 0), ("discarded", 5), ("rolled back", 4), ("end", runner.run.iter)]


def test_a_second_training_in_the_same_process_is_another_session(make_runner: MakeRunner) -> None:
    """Both sessions are in the file of the folder, and neither repeats the time or the iterations of the other."""
    runner = make_runner(train_cfg={"max_epochs": 1})
    runner.train()
    began = time.perf_counter()
    runner.train()
    first, second = read_sessions(Path(runner.strategy.work_dir))
    assert first.run_id == second.run_id
    assert (first.outcome, second.outcome) == ("complete", "complete")
    assert second.began >= first.ended - 0.01
    assert second.elapsed <= time.perf_counter() - began
    goodput = goodput_of(Path(runner.strategy.work_dir), Path(runner.strategy.log_dir))
    assert goodput is not None
    assert goodput.sessions == 2


@pytest.mark.slow
def test_a_stopped_and_a_failed_run_record_their_outcomes(make_runner: MakeRunner) -> None:
    """A signal and an error are distinguished from the end of a run, and from a kill."""

    def fail(_: object) -> None:
        raise ZeroDivisionError

    for action, outcome in (
        (lambda _: signal.raise_signal(signal.SIGTERM), "stopped"),
        (fail, "failed"),
        (stop, "stopped early"),
    ):
        runner = make_runner(custom_hooks=[At(3, action)])
        with suppress(SystemExit, ZeroDivisionError):
            runner.train()
        assert read_sessions(Path(runner.strategy.work_dir))[-1].outcome == outcome
