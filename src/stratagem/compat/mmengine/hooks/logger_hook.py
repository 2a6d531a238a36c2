"""Write what the log processor formats to the log and to the visualizer."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stratagem.compat.mmengine.fileio import FileClient, dump, get_file_backend
from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.logging import MMLogger, print_log
from stratagem.compat.mmengine.registry import HOOKS
from stratagem.compat.mmengine.utils import is_seq_of, scandir
from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["SUFFIX_TYPE", "LoggerHook"]

# Not only tuples of strings: configs contain lists.
SUFFIX_TYPE = Sequence[str] | str


@HOOKS.register_module()
class LoggerHook(Hook):
    """Write the losses, times and metrics that ``runner.log_processor`` formats to the log and to ``runner.visualizer``.

    Args:
        interval: the number of iterations between lines.
        ignore_last: whether the last iterations of an epoch, if there are fewer than ``interval``, get no line.
        interval_exp_name: the number of iterations between lines with the name of the experiment.
        out_dir: the folder in which a folder with the name of the work directory receives a copy of the logs at the end.
        out_suffix: the ends of the names of the files that are copied.
        keep_local: whether the original files are kept when they are copied.
        file_client_args: arguments of a ``FileClient``; deprecated.
        log_metric_by_epoch: whether the step of the metrics of a validation is the epoch; otherwise it is the iteration.
        backend_args: arguments of the file backend.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an interval is not positive, or both ``file_client_args`` and ``backend_args`` are given.
    """

    priority = "BELOW_NORMAL"

    def __init__(
        self,
        interval: int = 10,
        ignore_last: bool = True,
        interval_exp_name: int = 1000,
        out_dir: str | Path | None = None,
        out_suffix: SUFFIX_TYPE = (".json", ".log", ".py", "yaml"),
        keep_local: bool = True,
        file_client_args: dict[str, Any] | None = None,
        log_metric_by_epoch: bool = True,
        backend_args: dict[str, Any] | None = None,
    ) -> None:
        _check_positive("interval", interval)
        _check_type("ignore_last", ignore_last, bool, "a boolean")
        _check_positive("interval_exp_name", interval_exp_name)
        _check_type("out_dir", out_dir, str | Path | None, "a str or Path object")
        _check_type("keep_local", keep_local, bool, "a boolean")
        if not isinstance(out_suffix, str) and not is_seq_of(out_suffix, str):
            raise ConfigTypeError(f"out_suffix should be a string or a sequence of strings, but got {out_suffix!r}.")
        _check_client(out_dir, file_client_args, backend_args)
        self.out_suffix = out_suffix
        self.out_dir: Any = None if out_dir is None else os.fspath(out_dir)
        self.interval = interval
        self.ignore_last = ignore_last
        self.interval_exp_name = interval_exp_name
        self.keep_local = keep_local
        self.file_client_args = file_client_args
        self.log_metric_by_epoch = log_metric_by_epoch
        self.json_log_path: str | None = None
        if self.out_dir is not None:
            self.file_client = FileClient.infer_client(file_client_args, self.out_dir)
            if file_client_args is None:
                self.file_backend: Any = get_file_backend(self.out_dir, backend_args=backend_args)
            else:
                self.file_backend = self.file_client

    def before_run(self, runner: Any) -> None:
        if self.out_dir is not None:
            self.out_dir = self.file_backend.join_path(self.out_dir, Path(runner.work_dir).name)
            runner.logger.info(f"Text logs will be saved to {self.out_dir} after the training process.")
        self.json_log_path = f"{runner.timestamp}.json"

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: dict[str, Any] | None = None
    ) -> None:
        is_last = self.end_of_epoch(runner.train_dataloader, batch_idx)
        if self.every_n_train_iters(runner, self.interval_exp_name) or is_last:
            runner.logger.info(f"Exp name: {runner.experiment_name}")
        if not self.every_n_inner_iters(batch_idx, self.interval):
            is_short = len(runner.train_dataloader) <= self.interval
            if not is_last or (self.ignore_last and not is_short):
                return
        tag, line = runner.log_processor.get_log_after_iter(runner, batch_idx, "train")
        runner.logger.info(line)
        runner.visualizer.add_scalars(tag, step=runner.iter + 1, file_path=self.json_log_path)

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: Sequence[Any] | None = None
    ) -> None:
        self._log_evaluation_iter(runner, batch_idx, "val")

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, outputs: Sequence[Any] | None = None
    ) -> None:
        self._log_evaluation_iter(runner, batch_idx, "test")

    def _log_evaluation_iter(self, runner: Any, batch_idx: int, mode: str) -> None:
        if self.every_n_inner_iters(batch_idx, self.interval):
            runner.logger.info(runner.log_processor.get_log_after_iter(runner, batch_idx, mode)[1])

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        tag, line = runner.log_processor.get_log_after_epoch(runner, len(runner.val_dataloader), "val")
        runner.logger.info(line)
        # Reading the epoch would build the training loop.
        trains = runner._train_loop is not None and not isinstance(runner._train_loop, dict)
        position = (runner.epoch if self.log_metric_by_epoch else runner.iter) if trains else 0
        runner.visualizer.add_scalars(tag, step=position, file_path=self.json_log_path)

    def after_test_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        tag, line = runner.log_processor.get_log_after_epoch(
            runner, len(runner.test_dataloader), "test", with_non_scalar=True
        )
        runner.logger.info(line)
        dump(self._process_tags(tag), str(Path(runner.log_dir, f"{self.json_log_path}")))

    @staticmethod
    def _process_tags(tags: dict[str, Any]) -> OrderedDict[str, Any]:
        """Return values as JSON represents them; None for those that it cannot represent."""
        return OrderedDict((name, _for_json(value)) for name, value in tags.items())

    def after_run(self, runner: Any) -> None:
        runner.visualizer.close()
        if self.out_dir is None:
            return
        copied = []
        suffixes = self.out_suffix if isinstance(self.out_suffix, str) else tuple(self.out_suffix)
        for name in scandir(runner._log_dir, suffixes, True):
            local, remote = str(Path(runner._log_dir, name)), self.file_backend.join_path(self.out_dir, name)
            self.file_backend.put_text(Path(local).read_text(), remote)
            copied.append(local)
            runner.logger.info(f"The file {local} has been copied to {remote}.")
        if not self.keep_local:
            _remove_logs(copied, runner.logger)


def _remove_logs(files: Sequence[str], logger: Any) -> None:
    logger.info(f"{len(files)} files are removed, since keep_local=False: {', '.join(files)}")
    if isinstance(logger, MMLogger):
        logger.release_files()
    for file in files:
        Path(file).unlink()


def _for_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    if isinstance(value, dict):
        return {name: _for_json(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        return value.tolist()
    return value if isinstance(value, str | int | float) else None


def _check_type(name: str, value: Any, types: Any, expected: str) -> None:
    if not isinstance(value, types):
        raise ConfigTypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}).")


def _check_positive(name: str, value: Any) -> None:
    _check_type(name, value, int, "an integer")
    if value <= 0:
        raise ConfigValueError(f"{name} must be greater than 0, got {value}.")


def _check_client(out_dir: Any, file_client_args: Any, backend_args: Any) -> None:
    if file_client_args is None:
        return
    if out_dir is None:
        raise ConfigValueError("file_client_args needs out_dir, which is not specified. Set out_dir, or remove it.")
    print_log(
        '"file_client_args" will be deprecated in future. Please use "backend_args" instead',
        logger="current",
        level=logging.WARNING,
    )
    if backend_args is not None:
        raise ConfigValueError(
            '"file_client_args" and "backend_args" cannot be set at the same time. Use "backend_args".'
        )
