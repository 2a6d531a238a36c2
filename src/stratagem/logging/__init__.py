"""Logging for one run: log lines, smoothed scalars, a progress bar and JSON records."""

from typing import Any

from stratagem.logging.console import shared_console
from stratagem.logging.forward import forward_library_logs
from stratagem.logging.jsonlines import JsonLinesWriter
from stratagem.logging.logger import Logger
from stratagem.logging.progress import TrainingProgress
from stratagem.utils import import_object

__all__ = ["JsonLinesWriter", "Logger", "ScalarSmoother", "TrainingProgress", "forward_library_logs", "shared_console"]


def __getattr__(name: str) -> Any:
    # The command line prints its first line before it imports torch, which ScalarSmoother needs.
    if name != "ScalarSmoother":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = import_object("stratagem.logging.smoothing:ScalarSmoother")
    return found
