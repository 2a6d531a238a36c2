"""Which files of a run are open after its methods have returned or raised an error."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stratagem import Hook, Runner
from tests.train.toys import TEST, VALIDATION, settings


class Fails(Hook):
    """Raise an error in the third iteration, once."""

    has_failed = False

    def before_train_iter(self, run: Any, batch_idx: int, data_batch: Any = None) -> None:
        if batch_idx == 2 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("no more")


def open_files(folder: Path) -> list[str]:
    """Return the files in a folder that this process has open."""
    return [each.path for each in psutil.Process().open_files() if Path(each.path).is_relative_to(folder)]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[Runner]:
    """A run that fails in its third iteration, and is closed only at the end of the test."""
    logger = {"type": "LoggerHook", "interval": 1}
    runner = Runner(
        **settings(
            work_dir=tmp_path,
            default_hooks={"logger": logger},
            custom_hooks=[Fails()],
            log_level="INFO",
            **VALIDATION,
            **TEST,
        )
    )
    yield runner
    runner.close()


def iterations(runner: Runner) -> list[int]:
    """Return the iterations of the training records."""
    lines = (Path(runner.strategy.log_dir) / "vis_data" / "scalars.json").read_text().splitlines()
    return [record["iter"] for record in map(json.loads, lines) if record["mode"] == "train"]


def test_a_run_that_has_failed_keeps_no_file_open(runner: Runner, tmp_path: Path):
    """After an error in training, the log and the records are closed, so that no ResourceWarning appears later."""
    with pytest.raises(RuntimeError, match="no more"):
        runner.train()
    assert iterations(runner) == [1, 2]
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("method", [Runner.train, Runner.val, Runner.test, Runner.predict])
def test_a_method_that_has_returned_keeps_no_file_open(runner: Runner, tmp_path: Path, method: Callable[[Runner], Any]):
    """Training, evaluation and prediction close the log and the records."""
    next(hook for hook in runner.run.events.hooks if isinstance(hook, Fails)).has_failed = True
    method(runner)
    assert open_files(tmp_path) == []


@pytest.mark.slow
def test_a_run_that_continues_after_an_error_appends_to_its_files(runner: Runner):
    """The log and the records contain both calls to train() in order."""
    with pytest.raises(RuntimeError):
        runner.train()
    log = next(Path(runner.strategy.log_dir).glob("*.log"))
    first = log.read_text()
    runner.train()
    assert iterations(runner) == list(range(1, runner.run.iter + 1))
    assert log.read_text().startswith(first)
    assert len(log.read_text()) > len(first)


def test_a_line_after_the_run_is_in_the_log_which_is_closed_again(runner: Runner, tmp_path: Path):
    """A library or a finalizer may log after the run has ended; the file is open only while the line is written."""
    with pytest.raises(RuntimeError):
        runner.train()
    runner.strategy.logger.info("a late line")
    log = next(Path(runner.strategy.log_dir).glob("*.log"))
    assert log.read_text().endswith("a late line\n")
    assert open_files(tmp_path) == []
