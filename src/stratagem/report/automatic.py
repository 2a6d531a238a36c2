"""Write the report of a run when its session ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stratagem.errors import ConfigTypeError
from stratagem.report.collect import collect, is_session
from stratagem.report.page import page_of
from stratagem.storage import write_record
from stratagem.train.run.context import Run

__all__ = ["REPORT", "require_report", "reporting"]

# The name of the report in the work directory.
REPORT: Final = "report.html"


def require_report(report: Any) -> bool:
    """Check the argument ``report`` of the runner, and return it.

    Raises:
        ConfigTypeError: if it is not a bool.
    """
    if not isinstance(report, bool):
        raise ConfigTypeError(
            f"report must be True or False, got {report!r}. To choose the file, use `stratagem report RUN -o FILE.html`."
        )
    return report


@contextmanager
def reporting(run: Run, *, enabled: bool) -> Iterator[None]:
    """Write ``<work_dir>/report.html`` on rank 0 at the end of the context, also after an error."""
    try:
        yield
    finally:
        if enabled and run.rank == 0 and is_session(Path(run.log_dir)):
            _write(run)


def _write(run: Run) -> None:
    try:
        page = page_of([collect(Path(run.log_dir))])
    except Exception as error:  # noqa: BLE001 -- the training is over, and must not fail because of its report
        run.logger.warning(
            "The report was not written: %s: %s. The run does not depend on it.", type(error).__name__, error
        )
        return
    if write_record(Path(run.work_dir) / REPORT, page, run.logger):
        run.logger.info("Report: %s", Path(run.work_dir) / REPORT)
