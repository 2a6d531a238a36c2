"""What a checkpoint was saved for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, final

__all__ = ["Purpose"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Purpose:
    """What a checkpoint was saved for.

    Attributes:
        series: what it continues; checkpoints of one series replace each other. Empty for one that stands for itself.
        number: its place in the series.
        metric: of one that was the best so far, by which metric.
        score: its value.
        greater: whether greater values of it are better.
    """

    series: str = ""
    number: int = 0
    metric: str = ""
    score: float = 0.0
    greater: bool = True

    def as_meta(self) -> dict[str, Any]:
        """Return it as a checkpoint's ``meta`` and its manifest have it."""
        own: dict[str, Any] = {"series": self.series, "number": self.number}
        best = {"metric": self.metric, "score": self.score, "greater": self.greater}
        return {**own, **best} if self.metric else own

    @classmethod
    def from_meta(cls, meta: Any) -> Self:
        """Read it; a checkpoint that records none stands for itself."""
        if not isinstance(meta, Mapping):
            return cls()
        kinds = {"series": str, "number": int, "metric": str, "score": float, "greater": bool}
        return cls(**{name: meta[name] for name, kind in kinds.items() if isinstance(meta.get(name), kind)})

    def beats(self, other: Purpose) -> bool:
        """Tell whether its score is better than another's, by the same metric."""
        return self.score > other.score if self.greater else self.score < other.score
