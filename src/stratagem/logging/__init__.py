"""Logging for one run: log lines, smoothed scalars, a progress bar and JSON records."""

from stratagem.logging.console import shared_console
from stratagem.logging.forward import forward_library_logs
from stratagem.logging.jsonlines import JsonLinesWriter
from stratagem.logging.logger import Logger
from stratagem.logging.progress import TrainingProgress
from stratagem.logging.smoothing import ScalarSmoother

__all__ = ["JsonLinesWriter", "Logger", "ScalarSmoother", "TrainingProgress", "forward_library_logs", "shared_console"]
