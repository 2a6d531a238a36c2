"""Stratagem: a PyTorch training engine in which the strategy is all that changes with the machine.

Everything is imported when it is first asked for, so that ``import stratagem`` costs next to nothing.
"""

from importlib import import_module
from typing import Any

from stratagem._version import __version__

_HOME = {
    "BaseModel": "stratagem.model",
    "BaseStrategy": "stratagem.strategies",
    "ColossalAIStrategy": "stratagem.strategies",
    "Config": "stratagem.config",
    "ConfigDict": "stratagem.config",
    "DDPStrategy": "stratagem.strategies",
    "DeepSpeedStrategy": "stratagem.strategies",
    "FSDPStrategy": "stratagem.strategies",
    "Runner": "stratagem.runner",
    "SingleDeviceStrategy": "stratagem.strategies",
}

__all__ = [
    "BaseModel",
    "BaseStrategy",
    "ColossalAIStrategy",
    "Config",
    "ConfigDict",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "Runner",
    "SingleDeviceStrategy",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
