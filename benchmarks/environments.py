"""The interpreters of the engines that have environments of their own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

__all__ = ["ENGINES", "python_of"]

# Strategy -> the library that it needs, and what `make` calls the environment that has it.
ENGINES: Final = {
    "DeepSpeedStrategy": ("deepspeed", ".venv-deepspeed"),
    "ColossalAIStrategy": ("colossalai", ".venv-colossalai"),
}
_ROOT: Final = Path(__file__).parent.parent


def python_of(strategy: str) -> str | None:
    """Return the interpreter with which a strategy trains; None where its engine is nowhere installed."""
    if strategy not in ENGINES:
        return sys.executable
    library, environment = ENGINES[strategy]
    own = _ROOT / environment / "bin" / "python"
    if own.exists():
        return str(own)
    return sys.executable if importlib.util.find_spec(library) else None
