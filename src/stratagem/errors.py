"""Every error that Stratagem raises on purpose, sorted by who is at fault.

Each class also derives from the built-in class that people already catch for it (``ValueError``, ``KeyError`` ...),
and carries the exit status of the command line: 2 where the user can mend it, 1 where something failed.
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
    "TrainingError",
    "RankFailedError",
]


class StratagemError(Exception):
    """Base of all errors raised on purpose; its message says what happened, where, and what to do."""

    exit_status: ClassVar[int] = 1

    def __str__(self) -> str:
        # KeyError would print the repr of its message, and OSError would look for an errno.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(StratagemError):
    """Something in a configuration, or in an argument given in its place, is wrong."""

    exit_status = 2


class ConfigValueError(ConfigError, ValueError):
    """A value is outside of what is allowed, or a required one is missing."""


class ConfigTypeError(ConfigError, TypeError):
    """A value has the wrong type, such as a number where a model is due."""


class ConfigKeyError(ConfigError, KeyError):
    """A name is unknown: a key of a configuration, an entry of a registry, an argument of a target."""


class ConfigFileError(ConfigError, OSError):
    """A configuration file is missing, unreadable or of an unknown kind."""


class ConfigParsingError(ConfigError, RuntimeError):
    """A configuration file was read but its text is not valid."""


class StateError(StratagemError, RuntimeError):
    """A call came at a time when it cannot be served."""


class NotPreparedError(StateError):
    """A strategy was asked for what only ``prepare`` builds."""


class CheckpointError(StratagemError, RuntimeError):
    """A checkpoint cannot be written, found, read or applied."""

    exit_status = 2


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the given place."""


class CheckpointMismatchError(CheckpointError, ValueError):
    """A checkpoint is intact but belongs to something else: other keys, shapes or groups."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint of ours is incomplete or changed: truncated, a file missing, a size that differs."""

    exit_status = 1


class PlacementError(StratagemError, ValueError):
    """A strategy was asked for something that its placement cannot do."""

    exit_status = 2


class LaunchError(StratagemError, ValueError):
    """The processes of a run were started, or told to start, in a way that cannot work."""

    exit_status = 2


class MissingDependencyError(StratagemError, ImportError):
    """An optional package that a configuration names is not installed."""

    exit_status = 2


class WorkDirError(StratagemError, OSError):
    """A work directory cannot be made or written to."""

    exit_status = 2


class TrainingError(StratagemError, RuntimeError):
    """Training itself went wrong: a loss that is no tensor, a model without parameters, a dead worker."""


class RankFailedError(StratagemError, RuntimeError):
    """This rank stops because another one failed, ended or does not answer; nothing is wrong here."""
