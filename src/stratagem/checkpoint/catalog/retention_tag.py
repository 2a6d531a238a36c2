"""The reason for saving a checkpoint, which determines how long the checkpoint is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, final

__all__ = ["WEIGHTS_ONLY", "RetentionTag"]

# The group of checkpoints that were saved without the optimizer; see resumable_first().
WEIGHTS_ONLY: Final = "weights_only"

# Key in a checkpoint's meta -> (field, type).
_FIELDS = {
    "series": ("group", str),
    "number": ("number", int),
    "metric": ("metric", str),
    "score": ("score", float),
    "greater": ("greater", bool),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionTag:
    """The reason for saving a checkpoint.

    Attributes:
        group: the group of checkpoints in which newer ones replace older ones; empty if the checkpoint does not belong
            to a group.
        number: the epoch or iteration at which it was saved.
        metric: the metric for which this was the best checkpoint so far; empty for a regular checkpoint.
        score: the value of that metric.
        greater: whether greater values of the metric are better.
    """

    group: str = ""
    number: int = 0
    metric: str = ""
    score: float = 0.0
    greater: bool = True

    def as_meta(self) -> dict[str, Any]:
        """Return the tag as it is stored in a checkpoint's ``meta`` and in its manifest."""
        regular: dict[str, Any] = {"series": self.group, "number": self.number}
        best = {"metric": self.metric, "score": self.score, "greater": self.greater}
        return {**regular, **best} if self.metric else regular

    @classmethod
    def from_meta(cls, meta: Any) -> Self:
        """Read a tag from a checkpoint's ``meta``. If there is none, return a tag without a group."""
        if not isinstance(meta, Mapping):
            return cls()
        return cls(**{field: meta[key] for key, (field, kind) in _FIELDS.items() if isinstance(meta.get(key), kind)})

    def is_better_than(self, other: RetentionTag) -> bool:
        """Return whether the score is better than the score of ``other``, a tag for the same metric."""
        return self.score > other.score if self.greater else self.score < other.score
