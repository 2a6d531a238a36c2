"""The precision of evaluations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from stratagem.errors import ConfigTypeError
from stratagem.optim.amp import HALF_DTYPES, autocast_dtype
from stratagem.optim.gradient_policy import NO_CONTEXT
from stratagem.train.run.context import Run

__all__ = ["evaluation_dtype", "in_precision", "require_fp16", "training_autocast"]


def require_fp16(fp16: Any) -> bool | None:
    """Check the option ``fp16`` of an evaluation loop, and return it.

    Raises:
        ConfigTypeError: if the option is neither a bool nor None.
    """
    if fp16 is not None and not isinstance(fp16, bool):
        raise ConfigTypeError(
            f"fp16 must be True (16-bit precision), False (the dtype of the parameters) or None (as in training), got {fp16!r}."
        )
    return fp16


def evaluation_dtype(run: Run, fp16: bool | None) -> torch.dtype | None:
    """Return the dtype of autocast in an evaluation; None to compute in the dtype of the parameters.

    Args:
        run: the run. If it does not train, its training precision is the one recorded in the checkpoint.
        fp16: True for autocast's default on the device (float16 on CUDA, bfloat16 on the CPU), False for none, and None for
            the training precision.
    """
    if fp16 is None:
        optim = run.strategy.optim_wrapper_or_none
        return HALF_DTYPES.get(run.saved_autocast or "") if optim is None else autocast_dtype(optim)
    return torch.get_autocast_dtype(run.world.device.type) if fp16 else None


def training_autocast(run: Run) -> AbstractContextManager[object]:
    """Return a context in which a forward pass has the training precision."""
    return _autocast(run, evaluation_dtype(run, None))


def in_precision(run: Run, step: Callable[[Any], Any], dtype: torch.dtype | None) -> Callable[[Any], Any]:
    """Return a function that calls ``step`` under autocast and converts 16-bit outputs to float32, which keeps their values."""
    if dtype is None:
        return step

    def evaluate(batch: Any) -> Any:
        with _autocast(run, dtype):
            outputs = step(batch)
        return tree_map(_to_float32, outputs)

    return evaluate


def _autocast(run: Run, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return NO_CONTEXT if dtype is None else torch.autocast(run.world.device.type, dtype=dtype)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
