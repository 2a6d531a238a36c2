"""Measure a session of a run, and log the goodput of the run when it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stratagem.errors import ConfigError, StratagemError
from stratagem.train.goodput.account import goodput_of
from stratagem.train.goodput.recorder import TimesRecorder, recording_times
from stratagem.train.resume.session_record import is_complete
from stratagem.train.run.context import Run

__all__ = ["identify_session", "measured_session"]

# Variables in which launchers count the restarts of a job.
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@contextmanager
def measured_session(run: Run) -> Iterator[TimesRecorder | None]:
    """Measure and record a session for the duration of the context, then log the goodput of the run on rank 0.

    A run that cannot start because of an error in its configuration is not recorded, so that it leaves the folder unchanged.
    """
    folder = Path(run.log_dir)
    with recording_times(run.clock, folder, run.logger, records=run.rank == 0) as recorder:
        outcome = "failed"
        try:
            yield recorder
            outcome = _outcome(run)
        except StratagemError as error:
            if recorder is not None and not recorder.identified and error.exit_status == ConfigError.exit_status:
                recorder.discard()
            raise
        finally:
            if recorder is not None and not recorder.discarded:
                recorder.end(outcome)
                _log_goodput(run, folder)


def identify_session(
    run: Run, recorder: TimesRecorder | None, *, resumes: bool, environ: Mapping[str, str] = os.environ
) -> None:
    """Record which run the session belongs to, once the run is prepared.

    Args:
        run: the run.
        recorder: the recorder of the session; None on other ranks than 0.
        resumes: whether the run is configured to resume.
        environ: the environment variables.
    """
    if recorder is not None:
        restarted = any(environ.get(name, "0") not in {"", "0"} for name in _RESTART_COUNTS)
        recorder.identify(run.id, continues=run.strategy.resumed_from is None and (resumes or restarted))


def _outcome(run: Run) -> str:
    if run.interrupt.received is not None:
        return "stopped"
    return "complete" if is_complete(run) else "stopped early"


def _log_goodput(run: Run, folder: Path) -> None:
    goodput = goodput_of(Path(run.work_dir), folder)
    if goodput is not None:
        run.logger.info("%s", goodput.describe())
        run.record({**goodput.record(), "mode": "goodput", "epoch": run.epoch, "iter": run.iter})
