"""Write scalars for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from stratagem.train.hook import Hook
from stratagem.train.hook_priority import Priority
from stratagem.train.run.context import Run
from stratagem.utils import import_module
from stratagem.utils.scalars import as_number

__all__ = ["TensorboardHook"]

_POSITION_KEYS = ("epoch", "iter", "step")


@final
class TensorboardHook(Hook):
    """Write the recorded values as TensorBoard scalars on rank 0. Needs ``pip install stratagem[tensorboard]``.

    View them with ``tensorboard --logdir <work_dir>``.

    Args:
        folder: the folder for the event files; by default ``<log_dir>/tensorboard``.

    Raises:
        MissingDependencyError: if TensorBoard is not installed.
    """

    priority = Priority.VERY_HIGH

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        self._writer_class = import_module("torch.utils.tensorboard", extra="tensorboard").SummaryWriter

    def before_run(self, run: Run) -> None:
        if run.rank == 0 and not any(isinstance(each, _TensorboardRecorder) for each in run.recorders):
            folder = Path(self._folder) if self._folder else Path(run.log_dir) / "tensorboard"
            run.recorders.append(_TensorboardRecorder(self._writer_class(str(folder))))


@final
class _TensorboardRecorder:
    """Writes records to an event file; the names of the scalars start with the mode, such as ``train/``."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, record: Mapping[str, Any]) -> None:
        prefix = record.get("mode", "train")
        for name, value in record.items():
            if name not in _POSITION_KEYS and (number := as_number(value)) is not None:
                self._writer.add_scalar(f"{prefix}/{name}", number, record["step"])

    def close(self) -> None:
        self._writer.close()
