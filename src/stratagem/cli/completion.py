"""Suggest values of arguments and options to the shell."""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["complete_config", "complete_kind", "complete_launcher", "complete_strategy"]

_SUFFIXES: Final = frozenset({".py", ".yaml", ".yml", ".json", ".toml"})
_LAUNCHERS: Final = ("none", "pytorch", "slurm", "mpi", "ray")
_KINDS: Final = ("image", "text", "table")
_STRATEGIES: Final = ("single", "ddp", "fsdp", "deepspeed", "colossalai")


def complete_config(incomplete: str) -> list[str]:
    """Return the files that may be configurations and begin with ``incomplete``.

    If there are none, the list is empty, so that the shell suggests files and folders itself.
    """
    folder, _, beginning = incomplete.rpartition("/")
    where = Path(f"{folder}/") if folder or incomplete.startswith("/") else Path()
    prefix = f"{folder}/" if "/" in incomplete else ""
    try:
        names = sorted(
            entry.name for entry in where.expanduser().iterdir() if entry.suffix in _SUFFIXES and entry.is_file()
        )
    except OSError:
        return []
    return [prefix + name for name in names if name.startswith(beginning)]


def complete_strategy(incomplete: str) -> list[str]:
    """Return the short names of strategies that begin with ``incomplete``."""
    return [name for name in _STRATEGIES if name.startswith(incomplete)]


def complete_launcher(incomplete: str) -> list[str]:
    """Return the names of launchers that begin with ``incomplete``."""
    return [name for name in _LAUNCHERS if name.startswith(incomplete)]


def complete_kind(incomplete: str) -> list[str]:
    """Return the kinds of projects that begin with ``incomplete``."""
    return [name for name in _KINDS if name.startswith(incomplete)]
