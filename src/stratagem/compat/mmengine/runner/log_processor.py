"""Format the scalars of the message hub as lines of the log and as records."""

from __future__ import annotations

import copy
import datetime as dt
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from stratagem.compat.mmengine.checks import require
from stratagem.compat.mmengine.device import get_max_cuda_memory, is_cuda_available
from stratagem.compat.mmengine.registry import LOG_PROCESSORS
from stratagem.errors import ConfigTypeError, ConfigValueError

__all__ = ["LogProcessor"]

_TIMES = ("time", "data_time")


@LOG_PROCESSORS.register_module()
class LogProcessor:
    """Format the scalars that hooks and models have put into ``runner.message_hub``.

    All values are those of this rank; formatting is not a collective operation.

    Args:
        window_size: the number of iterations over which values that match ``mean_pattern`` are averaged. Of other values, the
            last one is shown.
        by_epoch: whether lines show the epoch and the number of the batch in it; otherwise the iteration.
        custom_cfg: statistics to show, each a dict: ``data_src``, the name of a value without its mode; ``method_name``, a
            statistic of ``HistoryBuffer``; ``log_name``, the name of the result, by default that of the value, which is
            replaced; ``window_size``, a number of iterations, ``"epoch"`` for those of the epoch, or ``"global"`` for all.
        num_digits: the number of digits after the decimal point.
        log_with_hierarchy: whether the names in records start with the mode, as in ``train/loss``.
        mean_pattern: a regular expression of the names of the values that are averaged.

    Raises:
        AssertionError: if two statistics have the same name, or one has ``window_size="epoch"`` without ``by_epoch``.
    """

    def __init__(
        self,
        window_size: int = 10,
        by_epoch: bool = True,
        custom_cfg: list[dict[str, Any]] | None = None,
        num_digits: int = 4,
        log_with_hierarchy: bool = False,
        mean_pattern: str = r".*(loss|time|data_time|grad_norm).*",
    ) -> None:
        self.window_size = window_size
        self.by_epoch = by_epoch
        self.custom_cfg = custom_cfg or []
        self.num_digits = num_digits
        self.log_with_hierarchy = log_with_hierarchy
        self.mean_pattern = re.compile(mean_pattern)
        self._check_custom_cfg()

    def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict[str, Any], str]:
        """Return a record of the values by name, and a line for the log.

        Args:
            runner: the runner.
            batch_idx: the number of the batch in the loop, from 0.
            mode: ``"train"``, ``"val"`` or ``"test"``.
        """
        require(mode in ("train", "test", "val"), f"mode must be 'train', 'val' or 'test', got {mode!r}.")
        custom_cfg = self._parse_windows_size(runner, batch_idx, self.custom_cfg)
        shown = self._collect_scalars(custom_cfg, runner, mode)
        tag = self._collect_scalars(custom_cfg, runner, mode, True) if self.log_with_hierarchy else copy.deepcopy(shown)
        rates = [self._remove_prefix(name, f"{mode}/") for name in tag if name.endswith("lr")]
        line = self._position(runner, batch_idx, mode)
        line += " ".join(f"{name}: {shown.pop(name):.{self.num_digits}e}" for name in rates) + "  "
        if self.by_epoch and mode != "test":
            tag["epoch"] = self._get_epoch(runner, mode)
        tag["iter"] = runner.iter + 1 if _trains(runner) else 0
        line += self._remaining_time(runner, shown)
        if is_cuda_available():
            tag["memory"] = self._get_max_memory(runner)
            line += f"memory: {tag['memory']}  "
        if mode == "val":
            shown = {name: value for name, value in shown.items() if name.startswith("val/loss")}
        return tag, line if mode == "test" else line + self._items(shown)

    def _position(self, runner: Any, batch_idx: int, mode: str) -> str:
        """Return the beginning of a line, such as ``Epoch(train) [1][ 10/200]``, with two spaces at the end."""
        kind = "Epoch" if self.by_epoch else "Iter"
        if self.by_epoch or mode != "train":
            current, last = batch_idx + 1, self._get_dataloader_size(runner, mode)
        else:
            current, last = self._get_iter(runner, batch_idx), runner.max_iters
        epoch = " "
        if self.by_epoch and mode != "test":
            epoch = f"[{self._get_epoch(runner, mode)}]"
            if _trains(runner):
                epoch = epoch.rjust(len(str(runner.max_epochs)) + 3)
        return f"{kind}({mode}){epoch}[{str(current).rjust(len(str(last)))}/{last}]  "

    def _remaining_time(self, runner: Any, shown: dict[str, Any]) -> str:
        """Remove the times from the values and return them with the remaining time, if all are known."""
        if not all(name in shown for name in _TIMES) or "eta" not in runner.message_hub.runtime_info:
            return ""
        eta = dt.timedelta(seconds=int(runner.message_hub.get_info("eta")))
        times = "".join(f"{name}: {shown.pop(name):.{self.num_digits}f}  " for name in _TIMES)
        return f"eta: {eta}  {times}"

    def get_log_after_epoch(
        self, runner: Any, batch_idx: int, mode: str, with_non_scalar: bool = False
    ) -> tuple[dict[str, Any], str]:
        """Return a record of the results of a validation or test, and a line for the log.

        Args:
            runner: the runner.
            batch_idx: the number of batches.
            mode: ``"val"`` or ``"test"``.
            with_non_scalar: whether the record contains results that are not numbers.
        """
        require(mode in ("test", "val"), f"mode must be 'val' or 'test', got {mode!r}.")
        size = self._get_dataloader_size(runner, mode)
        epoch = f"[{self._get_epoch(runner, mode)}]" if self.by_epoch and mode == "val" else ""
        line = f"{'Epoch' if self.by_epoch else 'Iter'}({mode}) {epoch}[{size}/{size}]  "
        custom_cfg = copy.deepcopy(self.custom_cfg)
        known = [self._remove_prefix(each["data_src"], f"{mode}/") for each in custom_cfg]
        custom_cfg += [
            {"data_src": name, "window_size": "epoch", "method_name": "mean"} for name in _TIMES if name not in known
        ]
        custom_cfg = self._parse_windows_size(runner, batch_idx, custom_cfg)
        scalars = self._collect_scalars(custom_cfg, runner, mode, self.log_with_hierarchy)
        others = self._collect_non_scalars(runner, mode)
        times = OrderedDict(
            (name, value) for name, value in scalars.items() if self._remove_prefix(name, f"{mode}/") in _TIMES
        )
        tag = OrderedDict((name, value) for name, value in scalars.items() if name not in times)
        line += "  " + self._items(OrderedDict(chain(tag.items(), others.items(), times.items())))
        if with_non_scalar:
            tag.update(others)
        tag.update(times)
        return tag, line

    def _items(self, values: Mapping[str, Any]) -> str:
        return "  ".join(f"{name}: {self._text(value)}" for name, value in values.items())

    def _text(self, value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.{self.num_digits}f}"
        return f"\n{value}\n" if isinstance(value, torch.Tensor | np.ndarray) else str(value)

    def _collect_scalars(
        self, custom_cfg: Sequence[Mapping[str, Any]], runner: Any, mode: str, reserve_prefix: bool = False
    ) -> dict[str, Any]:
        """Return the values of a mode, averaged or not, and the statistics of the configuration.

        Args:
            custom_cfg: the statistics, with integers as window sizes.
            runner: the runner.
            mode: the mode.
            reserve_prefix: whether the names keep the prefix with the mode.
        """
        prefix = f"{mode}/"
        histories = {
            name if reserve_prefix else self._remove_prefix(name, prefix): history
            for name, history in runner.message_hub.log_scalars.items()
            if name.startswith(mode)
        }
        tag: dict[str, Any] = OrderedDict()
        for name, history in histories.items():
            is_averaged = self.mean_pattern.search(name) is not None
            tag[name] = history.mean(self.window_size) if is_averaged else history.current()
        for each in custom_cfg:
            options = dict(each)
            source = options.pop("data_src")
            target = options.pop("log_name", source)
            if reserve_prefix:
                source, target = prefix + source, prefix + target
            if source in histories:
                tag[target] = histories[source].statistics(**options)
        return tag

    def _collect_non_scalars(self, runner: Any, mode: str) -> dict[str, Any]:
        """Return the results of a mode that are not numbers."""
        return OrderedDict(
            (name if self.log_with_hierarchy else self._remove_prefix(name, f"{mode}/"), value)
            for name, value in runner.message_hub.runtime_info.items()
            if name.startswith(mode)
        )

    def _remove_prefix(self, string: str, prefix: str) -> str:
        return string.removeprefix(prefix)

    def _check_custom_cfg(self) -> None:
        names: set[str] = set()
        for each in self.custom_cfg:
            require("data_src" in each, f"An entry of custom_cfg has no data_src: {each}.")
            name = each.get("log_name", each["data_src"])
            require(
                name not in names,
                f"Two entries of custom_cfg have the name {name!r}. Give one of them another log_name.",
            )
            names.add(name)
            require(
                self.by_epoch or each.get("window_size") != "epoch",
                f"The entry {name!r} of custom_cfg has window_size='epoch', which needs by_epoch=True. Set a number or 'global'.",
            )

    def _parse_windows_size(
        self, runner: Any, batch_idx: int, custom_cfg: Sequence[Mapping[str, Any]] | None = None
    ) -> list[dict[str, Any]]:
        """Return statistics with integers as window sizes.

        Raises:
            TypeError: if one is neither an integer nor ``"epoch"`` nor ``"global"``.
        """
        parsed = [copy.deepcopy(dict(each)) for each in (self.custom_cfg if custom_cfg is None else custom_cfg)]
        for each in parsed:
            size = each.get("window_size")
            if size == "epoch":
                each["window_size"] = batch_idx + 1
            elif size == "global":
                each["window_size"] = runner.iter + 1
            elif size is not None and not isinstance(size, int):
                raise ConfigTypeError(f"window_size should be an integer, 'epoch' or 'global', but got {size!r}.")
        return parsed

    def _get_max_memory(self, runner: Any) -> int:
        """Return the most memory, in MiB, that tensors have used on the device since the last call."""
        return int(get_max_cuda_memory(getattr(runner.model, "output_device", None)))

    def _get_iter(self, runner: Any, batch_idx: int) -> int:
        """Return the number of the current batch of the epoch, or of the run, from 1."""
        return int(batch_idx + 1 if self.by_epoch else runner.iter + 1)

    def _get_epoch(self, runner: Any, mode: str) -> int:
        """Return the current epoch of the training, from 1, or the number of those before a validation.

        Raises:
            ValueError: for another mode.
        """
        if mode == "train":
            return int(runner.epoch + 1)
        if mode == "val":
            return int(runner.epoch) if _trains(runner) else 0
        raise ConfigValueError(f"runner mode should be 'train' or 'val', but got {mode!r}.")

    def _get_cur_loop(self, runner: Any, mode: str) -> Any:
        loops = {"train": "train_loop", "val": "val_loop"}
        return getattr(runner, loops.get(mode, "test_loop"))

    def _get_dataloader_size(self, runner: Any, mode: str) -> int:
        return len(self._get_cur_loop(runner, mode).dataloader)


def _trains(runner: Any) -> bool:
    """Return whether the training loop has been built. Reading the epoch or the iteration would build it."""
    return runner._train_loop is not None and not isinstance(runner._train_loop, dict)
