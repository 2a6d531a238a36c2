"""MMEngine's names for the strategies of this package."""

from __future__ import annotations

from typing import Any

from stratagem.compat.mmengine.registry import STRATEGIES
from stratagem.registry import STRATEGIES as ENGINE_STRATEGIES
from stratagem.strategies import BaseStrategy, DDPStrategy, FSDPStrategy, SingleDeviceStrategy

__all__ = [
    "BaseStrategy",
    "ColossalAIStrategy",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "SingleDeviceStrategy",
]

# Imported on first use, because they import an engine.
_WITH_ENGINE = ("DeepSpeedStrategy", "ColossalAIStrategy")

for _strategy in (SingleDeviceStrategy, DDPStrategy, FSDPStrategy):
    STRATEGIES.register_module(module=_strategy)


def __getattr__(name: str) -> Any:
    if name not in _WITH_ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return ENGINE_STRATEGIES.get(name)
