"""Find the Python interpreters of engines that have separate environments."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Final

__all__ = ["ENGINES", "python_of"]

# Maps each strategy to its library and to the environment that `make` creates for it.
ENGINES: Final = {
    "DeepSpeedStrategy": ("deepspeed", ".venv-deepspeed"),
    "ColossalAIStrategy": ("colossalai", ".venv-colossalai"),
}
_ROOT: Final = Path(__file__).parent.parent


def python_of(strategy: str) -> str | None:
    """Return the Python interpreter for a strategy; None if its engine is not installed."""
    if strategy not in ENGINES:
        return sys.executable
    library, environment = ENGINES[strategy]
    own = _ROOT / environment / "bin" / "python"
    if own.exists():
        return str(own)
    return sys.executable if importlib.util.find_spec(library) else None
