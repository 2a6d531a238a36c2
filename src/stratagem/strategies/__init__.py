"""Strategies: where and how a run executes.

Switching to a different strategy requires no other change to a configuration. The strategies for engines are defined in
:mod:`stratagem.engines`, which depends on this package. They can be imported from here as well and are loaded on first
use.
"""

from importlib import import_module
from typing import Any

from stratagem.strategies.base import BaseStrategy
from stratagem.strategies.composed import ComposedStrategy
from stratagem.strategies.ddp import DDPStrategy
from stratagem.strategies.fsdp import FSDPStrategy
from stratagem.strategies.prepared import PreparedComponents
from stratagem.strategies.single import SingleDeviceStrategy

_ENGINE_STRATEGIES = {
    "ColossalAIStrategy": "stratagem.engines.colossalai.strategy",
    "DeepSpeedStrategy": "stratagem.engines.deepspeed.strategy",
}

__all__ = [
    "BaseStrategy",
    "ComposedStrategy",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "ColossalAIStrategy",
    "FSDPStrategy",
    "PreparedComponents",
    "SingleDeviceStrategy",
]


def __getattr__(name: str) -> Any:
    if name not in _ENGINE_STRATEGIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ENGINE_STRATEGIES[name]), name)
