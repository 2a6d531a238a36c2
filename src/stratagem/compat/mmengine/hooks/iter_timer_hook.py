"""Time iterations and estimate how long the run still takes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.registry import HOOKS

__all__ = ["IterTimerHook"]


@HOOKS.register_module()
class IterTimerHook(Hook):
    """Put ``<mode>/data_time``, ``<mode>/time`` and ``eta``, in seconds, into the message hub.

    On accelerators, operations are asynchronous. The mean time over many iterations is right; that of one iteration is the
    time that the host needed.
    """

    priority = "NORMAL"

    def __init__(self) -> None:
        self.time_sec_tot: float = 0
        self.time_sec_test_val: float = 0
        self.start_iter = 0
        self.t = 0.0

    def before_train(self, runner: Any) -> None:
        # The iterations before a resume took no time in this process.
        self.start_iter = runner.iter

    def _before_epoch(self, runner: Any, mode: str = "train") -> None:
        self.t = time.time()

    def _after_epoch(self, runner: Any, mode: str = "train") -> None:
        self.time_sec_test_val = 0

    def _before_iter(self, runner: Any, batch_idx: int, data_batch: DATA_BATCH = None, mode: str = "train") -> None:
        runner.message_hub.update_scalar(f"{mode}/data_time", time.time() - self.t)

    def _after_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: DATA_BATCH = None,
        outputs: Sequence[Any] | Mapping[str, Any] | None = None,
        mode: str = "train",
    ) -> None:
        hub = runner.message_hub
        hub.update_scalar(f"{mode}/time", time.time() - self.t)
        self.t = time.time()
        elapsed = hub.get_scalar(f"{mode}/time").current()
        if mode == "train":
            self.time_sec_tot += elapsed
            mean = self.time_sec_tot / (runner.iter - self.start_iter + 1)
            left = runner.max_iters - runner.iter - 1
        else:
            loader = runner.val_dataloader if mode == "val" else runner.test_dataloader
            self.time_sec_test_val += elapsed
            mean = self.time_sec_test_val / (batch_idx + 1)
            left = len(loader) - batch_idx - 1
        hub.update_info("eta", mean * left)
