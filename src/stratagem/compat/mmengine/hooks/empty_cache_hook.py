"""Free the cached memory of the GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stratagem.compat.mmengine.device import is_cuda_available
from stratagem.compat.mmengine.hooks.hook import DATA_BATCH, Hook
from stratagem.compat.mmengine.registry import HOOKS

__all__ = ["EmptyCacheHook"]


@HOOKS.register_module()
class EmptyCacheHook(Hook):
    """Release the unused memory that PyTorch caches on the GPU.

    Args:
        before_epoch: whether to do so before each epoch.
        after_epoch: whether to do so after each epoch.
        after_iter: whether to do so after each iteration. This is slow.
    """

    priority = "NORMAL"

    def __init__(self, before_epoch: bool = False, after_epoch: bool = True, after_iter: bool = False) -> None:
        self._do_before_epoch = before_epoch
        self._do_after_epoch = after_epoch
        self._do_after_iter = after_iter

    def _before_epoch(self, runner: Any, mode: str = "train") -> None:
        _empty_cache(self._do_before_epoch)

    def _after_epoch(self, runner: Any, mode: str = "train") -> None:
        _empty_cache(self._do_after_epoch)

    def _after_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: DATA_BATCH = None,
        outputs: Sequence[Any] | Mapping[str, Any] | None = None,
        mode: str = "train",
    ) -> None:
        _empty_cache(self._do_after_iter)


def _empty_cache(wanted: bool) -> None:
    if wanted and is_cuda_available():
        torch.cuda.empty_cache()
