"""Exceptions raised by Stratagem.

Each class also derives from the built-in exception that callers would catch (``ValueError``, ``KeyError`` ...), and
defines the exit status of the command line: 2 for errors that the user can correct, 1 for failures.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "StratagemError",
    "ConfigError",
    "ConfigValueError",
    "ConfigTypeError",
    "ConfigKeyError",
    "ConfigFileError",
    "ConfigFileNotFoundError",
    "ConfigParsingError",
    "StateError",
    "NotPreparedError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointMismatchError",
    "CheckpointDamagedError",
    "PlacementError",
    "LaunchError",
    "MissingDependencyError",
    "WorkDirError",
    "TraceError",
    "ParityError",
    "TrainingError",
    "RankFailedError",
]


class StratagemError(Exception):
    """Base class of all Stratagem exceptions. The message states what happened, where, and how to fix it."""

    exit_status: ClassVar[int] = 1

    def __str__(self) -> str:
        # KeyError would print the repr of its message, and OSError would expect an errno.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(StratagemError):
    """A configuration or an argument is invalid."""

    exit_status = 2


class ConfigValueError(ConfigError, ValueError):
    """A value is not allowed, or a required value is missing."""


class ConfigTypeError(ConfigError, TypeError):
    """A value has the wrong type, such as a number where a model is expected."""


class ConfigKeyError(ConfigError, KeyError):
    """A name is unknown: a configuration key, a registry entry or an argument of a target."""


class ConfigFileError(ConfigError, OSError):
    """A configuration file is missing, cannot be read or has an unknown suffix."""


class ConfigFileNotFoundError(ConfigFileError, FileNotFoundError):
    """A configuration file does not exist."""


class ConfigParsingError(ConfigError, RuntimeError):
    """The contents of a configuration file are invalid."""


class StateError(StratagemError, RuntimeError):
    """A method was called in a state that does not allow it."""


class NotPreparedError(StateError):
    """An attribute that ``prepare`` creates was used before ``prepare`` was called."""


class CheckpointError(StratagemError, RuntimeError):
    """A checkpoint cannot be written, found, read or loaded."""

    exit_status = 2


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint exists at the given path."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint is intact but does not match the run: its keys, shapes or parameter groups differ."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is incomplete or was modified: it is truncated, lacks a file or has a file of a different size."""

    exit_status = 1


class PlacementError(StratagemError, ValueError):
    """A strategy does not support the requested option, model or optimizer."""

    exit_status = 2


class LaunchError(StratagemError, ValueError):
    """The processes of a run cannot be launched, or cannot form a process group, as configured."""

    exit_status = 2


class MissingDependencyError(StratagemError, ImportError):
    """An optional package that a configuration requires is not installed."""

    exit_status = 2


class WorkDirError(StratagemError, OSError):
    """A work directory cannot be created or written to."""

    exit_status = 2


class TrainingError(StratagemError, RuntimeError):
    """Training failed, for example because the loss is not a tensor or a worker process died."""


class TraceError(StratagemError, ValueError):
    """A trace cannot be read, or two traces cannot be compared."""

    exit_status = 2


class ParityError(StratagemError, RuntimeError):
    """The variants of a training cannot be compared, because one of them cannot be trained."""

    exit_status = 2


class LaunchedRankError(StratagemError, RuntimeError):
    """A function that ``launch`` called in several processes failed on one of them."""


class RankFailedError(StratagemError, RuntimeError):
    """This rank was stopped because another rank failed, exited or stopped responding."""
