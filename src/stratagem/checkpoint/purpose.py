"""Which run saved a checkpoint, and what for: what retention goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from stratagem.checkpoint.formats import SINGLE_FILES, format_for
from stratagem.checkpoint.manifest import MANIFEST, read_manifest
from stratagem.errors import CheckpointError

__all__ = ["Purpose", "Saved", "saved_by"]


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
        """Read it; what says nothing of it stands for itself."""
        if not isinstance(meta, Mapping):
            return cls()
        kinds = {"series": str, "number": int, "metric": str, "score": float, "greater": bool}
        return cls(**{name: meta[name] for name, kind in kinds.items() if isinstance(meta.get(name), kind)})

    def beats(self, other: Purpose) -> bool:
        """Tell whether its score is better than another's, by the same metric."""
        return self.score > other.score if self.greater else self.score < other.score


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint on the disk: when it was saved, after how many iterations, what for, and whether it can be used."""

    path: Path
    saved_at: float
    iter: int
    purpose: Purpose
    finite: bool = True


def saved_by(run_id: str, folder: Path) -> list[Saved]:
    """Return the checkpoints in a folder that a run saved, the oldest first.

    Those that cannot be read are nobody's. Of single files their ``meta`` tells, of which no tensor is read.
    """
    entries = folder.iterdir() if folder.is_dir() else ()
    found = (_look_at(entry, run_id) for entry in entries if not entry.name.startswith("."))
    return sorted((each for each in found if each is not None), key=lambda saved: (saved.saved_at, saved.iter))


def _look_at(entry: Path, run_id: str) -> Saved | None:
    try:
        if (entry / MANIFEST).is_file():
            manifest = read_manifest(entry)
            said = {**manifest, **manifest["position"]}
        elif entry.suffix in SINGLE_FILES and entry.is_file():
            meta = format_for(entry).load(entry, parts=["meta"], verify=False).get("meta")
            said = {**meta, "saved_at": entry.stat().st_mtime} if isinstance(meta, Mapping) else {}
        else:
            return None
    except (CheckpointError, OSError):
        return None
    if said.get("run_id") != run_id:
        return None
    return Saved(
        path=entry,
        saved_at=said["saved_at"],
        iter=said.get("iter", 0),
        purpose=Purpose.from_meta(said.get("purpose")),
        finite=said.get("finite") is not False,
    )
