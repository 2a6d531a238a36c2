"""Tests of the report that is written at the end of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stratagem import Runner
from tests.train.toys import QUIET_HOOKS, At

MakeRunner = Callable[..., Runner]


def test_training_writes_a_report(make_runner: MakeRunner) -> None:
    """The report in the work directory contains the values of the run, its outcome and its goodput."""
    runner = make_runner(report=True, default_hooks={**QUIET_HOOKS, "logger": {"interval": 2}})
    runner.train()
    page = (Path(runner.strategy.work_dir) / "report.html").read_text()
    assert '"loss":{"x":[2,4,6' in page
    assert "complete" in page
    assert "Goodput" in page


def test_a_run_that_fails_has_a_report(make_runner: MakeRunner) -> None:
    """The report of a run that raised an error contains the error."""

    def fail(run: object) -> None:
        raise ZeroDivisionError("on purpose")

    runner = make_runner(report=True, custom_hooks=[At(2, fail)])
    with pytest.raises(ZeroDivisionError):
        runner.train()
    assert "failed: ZeroDivisionError: on purpose" in (Path(runner.strategy.work_dir) / "report.html").read_text()


def test_report_false_writes_no_report(make_runner: MakeRunner) -> None:
    """The report can be switched off."""
    runner = make_runner(report=False)
    runner.train()
    assert not (Path(runner.strategy.work_dir) / "report.html").exists()


def test_a_report_that_cannot_be_written_is_a_warning(
    make_runner: MakeRunner, capfd: pytest.CaptureFixture[str]
) -> None:
    """If writing or collecting fails, training still ends successfully."""
    runner = make_runner(report=True, log_level="WARNING")
    (Path(runner.strategy.work_dir) / "report.html").mkdir(parents=True)
    runner.train()
    assert "report.html was not written" in capfd.readouterr().err


def test_an_error_in_the_report_is_a_warning(
    make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A mistake in the code of the report does not fail the training."""

    def fail(path: Path) -> None:
        raise IndexError("on purpose")

    monkeypatch.setattr("stratagem.report.automatic.collect", fail)
    make_runner(report=True, log_level="WARNING").train()
    assert "The report was not written: IndexError: on purpose" in capfd.readouterr().err
