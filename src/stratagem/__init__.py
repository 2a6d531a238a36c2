"""Stratagem: a PyTorch training engine in which only the strategy changes with the hardware.

``__all__`` lists the names that users call or subclass. They are imported on first use, so ``import stratagem`` is fast.
Other modules can be imported too, but they may change between minor versions.
"""

from importlib import import_module
from typing import Any

from stratagem._version import __version__

_HOME = {
    "AmpOptimWrapper": "stratagem.optim",
    "BaseMetric": "stratagem.train",
    "BaseModel": "stratagem.model",
    "BaseStrategy": "stratagem.strategies",
    "ColossalAIStrategy": "stratagem.strategies",
    "Config": "stratagem.config",
    "ConfigDict": "stratagem.config",
    "DATASETS": "stratagem.registry",
    "DDPStrategy": "stratagem.strategies",
    "DeepSpeedStrategy": "stratagem.strategies",
    "FSDPStrategy": "stratagem.strategies",
    "FUNCTIONS": "stratagem.registry",
    "HOOKS": "stratagem.registry",
    "Hook": "stratagem.train",
    "METRICS": "stratagem.registry",
    "MODELS": "stratagem.registry",
    "ModelWithLoss": "stratagem.model",
    "OptimWrapper": "stratagem.optim",
    "OptimWrapperDict": "stratagem.optim",
    "Run": "stratagem.train",
    "Runner": "stratagem.runner",
    "SingleDeviceStrategy": "stratagem.strategies",
    "StratagemError": "stratagem.errors",
    "SupervisedModel": "stratagem.model",
    "TRACKERS": "stratagem.registry",
    "Tracker": "stratagem.train.trackers",
    "allow_packages": "stratagem.registry",
    "launch": "stratagem.cli.launch.launch",
    "load_checkpoint": "stratagem.checkpoint",
    "plan": "stratagem.planning.planner",
    "save_checkpoint": "stratagem.checkpoint",
    "summary": "stratagem.planning.summary",
}
# Folders whose names are used through them: stratagem.trace.record(...).
_FOLDERS = ("trace",)

__all__ = [
    "AmpOptimWrapper",
    "BaseMetric",
    "BaseModel",
    "BaseStrategy",
    "ColossalAIStrategy",
    "Config",
    "ConfigDict",
    "DATASETS",
    "DDPStrategy",
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "FUNCTIONS",
    "HOOKS",
    "Hook",
    "METRICS",
    "MODELS",
    "ModelWithLoss",
    "OptimWrapper",
    "OptimWrapperDict",
    "Run",
    "Runner",
    "SingleDeviceStrategy",
    "StratagemError",
    "SupervisedModel",
    "TRACKERS",
    "Tracker",
    "allow_packages",
    "launch",
    "load_checkpoint",
    "plan",
    "save_checkpoint",
    "summary",
    "trace",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_FOLDERS})
