"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import final

__all__ = ["Finding", "Verdict"]


class Verdict(Enum):
    """How a finding is to be taken."""

    GOOD = "good"
    NOTE = "note"
    PROBLEM = "problem"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at: what it is, what was found, and for all but a good one what to do about it."""

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""

    @classmethod
    def good(cls, subject: str, found: str) -> Finding:
        """Say that all is well."""
        return cls(subject=subject, verdict=Verdict.GOOD, found=found)

    @classmethod
    def note(cls, subject: str, found: str, advice: str) -> Finding:
        """Say what may be meant so, but costs something."""
        return cls(subject=subject, verdict=Verdict.NOTE, found=found, advice=advice)

    @classmethod
    def problem(cls, subject: str, found: str, advice: str) -> Finding:
        """Say what will not work."""
        return cls(subject=subject, verdict=Verdict.PROBLEM, found=found, advice=advice)
