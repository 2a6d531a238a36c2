"""Require the packages of trackers when a run is configured, without importing them."""

from __future__ import annotations

import importlib.util

from stratagem.errors import MissingDependencyError
from stratagem.utils.imports import without_working_directory

__all__ = ["require_package"]


def require_package(package: str, *, extra: str) -> None:
    """Require that a package is installed.

    Raises:
        MissingDependencyError: if it is not. The message states how to install it.
    """
    with without_working_directory():
        found = importlib.util.find_spec(package)
    if found is None:
        raise MissingDependencyError(f"{package} is not installed. Install it: pip install stratagem[{extra}]")
