"""Which run saved a checkpoint, and what for: what retention goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final

from stratagem.checkpoint.formats import SINGLE_FILES, format_for
from stratagem.checkpoint.manifest import MANIFEST, read_manifest
from stratagem.errors import CheckpointError

__all__ = ["Purpose", "Saved", "saved_by", "saved_in"]


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
    """Return the checkpoints in a folder that a run saved, the oldest first; see :func:`saved_in`."""
    return saved_in(folder).get(run_id, [])


def saved_in(folder: Path) -> dict[str, list[Saved]]:
    """Return the checkpoints in a folder by the id of the run that saved them, the oldest of each first.

    Those that cannot be read are nobody's. Of single files their ``meta`` tells, of which no tensor is read.
    """
    by_run: dict[str, list[Saved]] = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        said = {} if entry.name.startswith(".") else _said_of(entry)
        if isinstance(said.get("run_id"), str):
            saved = Saved(
                path=entry,
                saved_at=said["saved_at"],
                iter=said.get("iter", 0),
                purpose=Purpose.from_meta(said.get("purpose")),
                finite=said.get("finite") is not False,
            )
            by_run.setdefault(said["run_id"], []).append(saved)
    return {run_id: sorted(saved, key=lambda each: (each.saved_at, each.iter)) for run_id, saved in by_run.items()}


def _said_of(entry: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself; nothing where it is none, or cannot be read."""
    try:
        if (entry / MANIFEST).is_file():
            manifest = read_manifest(entry)
            return {**manifest, **manifest["position"]}
        if entry.suffix in SINGLE_FILES and entry.is_file():
            meta = format_for(entry).load(entry, parts=["meta"], verify=False).get("meta")
            return {**meta, "saved_at": entry.stat().st_mtime} if isinstance(meta, Mapping) else {}
    except (CheckpointError, OSError):
        pass
    return {}
