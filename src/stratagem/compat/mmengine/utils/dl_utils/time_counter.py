"""Measure how long a function or a block takes on average."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.dist.utils import is_main_process
from stratagem.compat.mmengine.logging.logger import print_log

__all__ = ["TimeCounter"]


class TimeCounter:
    """Log the average time of a decorated function or of a ``with`` block, on rank 0.

    Counters with the same tag are one object.

    Args:
        log_interval: log after every n-th run.
        warmup_interval: the average starts at this run, counted from 1.
        with_sync: whether to wait for the accelerator before and after each run.
        tag: the name in the log; needed for a ``with`` block, and by default the name of the decorated function.
        logger: see :func:`~stratagem.compat.mmengine.logging.logger.print_log`.

    Raises:
        AssertionError: if ``warmup_interval`` is less than 1, or a ``with`` block has no tag.
    """

    instance_dict: ClassVar[dict[str, Any]] = {}

    def __new__(
        cls,
        log_interval: int = 1,
        warmup_interval: int = 1,
        with_sync: bool = True,
        tag: str | None = None,
        logger: logging.Logger | str | None = None,
    ) -> Self:
        require(warmup_interval >= 1, f"warmup_interval must be at least 1, got {warmup_interval}.")
        if tag is not None and tag in cls.instance_dict:
            found: Self = cls.instance_dict[tag]
            return found
        self = super().__new__(cls)
        self.log_interval, self.warmup_interval, self.with_sync = log_interval, warmup_interval, with_sync
        self.tag, self.logger = tag, logger
        self._count, self._total, self._start = 0, 0.0, 0.0
        if tag is not None:
            cls.instance_dict[tag] = self
        return self

    log_interval: int
    warmup_interval: int
    with_sync: bool
    tag: str | None
    logger: logging.Logger | str | None
    _count: int
    _total: float
    _start: float

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.tag is None:
            self.tag = function.__name__

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._finish(start)
            return result

        return timed

    def __enter__(self) -> None:
        require(self.tag is not None, "A TimeCounter for a block needs a tag, which identifies it in the log.")
        self._synchronize()
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._finish(self._start)

    def print_time(self, elapsed: float) -> None:
        """Count a run that took ``elapsed`` seconds, and log the average if it is due."""
        if self._count < self.warmup_interval:
            return
        self._total += elapsed
        if self._count % self.log_interval == 0 and is_main_process():
            mean_ms = 1000 * self._total / (self._count - self.warmup_interval + 1)
            print_log(
                f"[{self.tag}]-time per run averaged in the past {self._count} runs: {mean_ms:.1f} ms", self.logger
            )

    def _finish(self, start: float) -> None:
        self._synchronize()
        self._count += 1
        self.print_time(time.perf_counter() - start)

    def _synchronize(self) -> None:
        if self.with_sync and torch.accelerator.is_available():
            torch.accelerator.synchronize()
