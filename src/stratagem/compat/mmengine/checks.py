"""Errors for invalid arguments. MMEngine uses assertions for them, so they are assertion errors here, too."""

from __future__ import annotations

from typing import Any, Never

from stratagem.errors import ConfigValueError, MissingDependencyError, StratagemError

__all__ = ["InvalidArgumentError", "NotSupportedError", "not_supported", "require"]


class InvalidArgumentError(ConfigValueError, AssertionError):
    """An argument is invalid. Also an ``AssertionError``, which MMEngine raises for many arguments."""


class NotSupportedError(StratagemError, NotImplementedError):
    """A part of MMEngine's interface that this package does not implement was used."""


def require(condition: object, message: str) -> None:
    """Raise an error if a condition does not hold.

    The message is formatted in any case. Where it contains a tensor, or in a function that is called in every iteration, raise
    the error in an ``if`` instead.

    Raises:
        InvalidArgumentError: with the message.
    """
    if not condition:
        raise InvalidArgumentError(message)


def not_supported(name: str, instead: str) -> type[Any]:
    """Return a class that can be imported and subclassed, and raises an error when it is instantiated.

    Args:
        name: the name of the class in MMEngine.
        instead: what to use instead, as the end of a sentence that starts with "Use".
    """

    def refuse(self: Any, *_: Any, **__: Any) -> Never:  # noqa: ARG001
        raise NotSupportedError(f"{name} is not supported. Use {instead}.")

    return type(name, (), {"__init__": refuse, "__doc__": f"Not supported: use {instead}."})


def missing_package(package: str, purpose: str) -> MissingDependencyError:
    """Return the error that a package is not installed."""
    return MissingDependencyError(f"{purpose} needs {package}, which is not installed: pip install {package}")
