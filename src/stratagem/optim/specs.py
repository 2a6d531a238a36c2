"""The types that configurations and users may pass for optimizers and parameter schedulers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from stratagem.optim.base import BaseOptimWrapper
from stratagem.optim.optim_wrapper_dict import OptimWrapperDict
from stratagem.optim.schedules.base import ParamScheduler

__all__ = ["OptimSpec", "SchedulerSpec"]

# An optimizer wrapper, a mapping from names to wrappers, an optimizer, or the configuration of one of them.
OptimSpec = BaseOptimWrapper | OptimWrapperDict | Optimizer | Mapping[str, Any]
# A scheduler, several schedulers, a mapping from optimizer names to schedulers, or configurations of these.
SchedulerSpec = ParamScheduler | Mapping[str, Any] | Sequence[ParamScheduler | Mapping[str, Any]]
