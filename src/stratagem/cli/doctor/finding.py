"""The result of a check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import final

__all__ = ["Finding", "Verdict"]


class Verdict(Enum):
    """The severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of a check.

    Attributes:
        subject: the item that was checked.
        verdict: the severity.
        found: the observed values.
        advice: how to fix it; empty if the verdict is ``OK``.
    """

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""

    @classmethod
    def ok(cls, subject: str, found: str) -> Finding:
        """Return a finding that needs no action."""
        return cls(subject=subject, verdict=Verdict.OK, found=found)

    @classmethod
    def warning(cls, subject: str, found: str, advice: str) -> Finding:
        """Return a finding that may be intended but has a cost, such as a slow file system."""
        return cls(subject=subject, verdict=Verdict.WARNING, found=found, advice=advice)

    @classmethod
    def problem(cls, subject: str, found: str, advice: str) -> Finding:
        """Return a finding that prevents training."""
        return cls(subject=subject, verdict=Verdict.PROBLEM, found=found, advice=advice)
