"""A run that its launcher starts again goes on with its own checkpoints, whatever its configuration says of resuming."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, final

from stratagem.checkpoint import CheckpointInfo, list_checkpoints
from stratagem.distributed import ProcessIdentity
from stratagem.storage import write_atomic

__all__ = ["LaunchIdentity", "find_restart_checkpoint"]

# What tells a process from all others: its id, its PID namespace and its start time.
Identity = tuple[int, str, str]
# Beside the checkpoints; the dot keeps it from what people list.
_RECORD = ".launch.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchIdentity:
    """What started the processes of a run, as far as it may start them again.

    ``agents`` are torchrun's processes, which outlive the ranks that they start; ``job`` is SLURM's number, which a job
    keeps when it is put back into the queue, and ``restarts`` how often that was. ``process`` is this one.
    """

    process: Identity
    run_id: str | None = None
    agents: tuple[Identity, ...] = ()
    job: str | None = None
    restarts: int = 0

    @classmethod
    def here(
        cls,
        parents: Sequence[ProcessIdentity],
        environ: Mapping[str, str] = os.environ,
        *,
        process: ProcessIdentity | None = None,
    ) -> Self:
        """Read it from the environment; ``parents`` are the processes that started the ranks, ``process`` is this one."""
        run_id = environ.get("TORCHELASTIC_RUN_ID")
        agents = {_identity(parent) for parent in parents} if run_id is not None else set()
        restarts = environ.get("SLURM_RESTART_COUNT", "")
        return cls(
            process=_identity(process or ProcessIdentity.here()),
            run_id=run_id,
            agents=tuple(sorted(agents)),
            job=environ.get("SLURM_JOB_ID"),
            restarts=int(restarts) if restarts.isdigit() else 0,
        )

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Return what was written down by an earlier start."""
        process, agents = tuple(record["process"]), tuple(tuple(agent) for agent in record["agents"])
        return cls(**{**record, "process": process, "agents": agents})

    @property
    def may_restart(self) -> bool:
        """Whether there is anything that may start these ranks again."""
        return self.run_id is not None or self.job is not None

    def continues(self, earlier: LaunchIdentity) -> bool:
        """Tell whether this is the same launch, now or in a later start.

        One of torchrun's agents is still there, or SLURM started the same job once more: a second `srun` of a job, or a
        rendezvous id that was used before, is no restart.
        """
        same_agent = (
            self.run_id is not None and self.run_id == earlier.run_id and set(self.agents) & set(earlier.agents)
        )
        requeued = self.job is not None and self.job == earlier.job and self.restarts > earlier.restarts
        return bool(same_agent) or requeued


def find_restart_checkpoint(folder: Path, launch: LaunchIdentity, logger: logging.Logger) -> Path | None:
    """Return the newest checkpoint that earlier starts of this launch saved; None if they saved none, or this is the first.

    The first start records which checkpoints there were before it, in the run's folder; those are not its own, whatever
    their time. Called on rank 0.
    """
    if not launch.may_restart:
        return None
    record = folder / _RECORD
    found = {str(each.path): each for each in list_checkpoints(folder)}
    present = {path: _version(each) for path, each in found.items()}
    earlier, before = _read(record)
    again = earlier is not None and launch.continues(earlier)
    write_atomic(record, json.dumps({"launch": asdict(launch), "before": before if again else present}))
    if earlier is None or not again or earlier.process == launch.process:
        # Not started again: a program may well train twice.
        return None
    own = [each for path, each in found.items() if before.get(path) != present[path]]
    latest = next((each.path for each in own if not each.fault), None)
    if latest is None:
        unusable = f" ({len(own)} that it saved cannot be used)" if own else ""
        logger.warning(
            "The launcher started this run again before its first checkpoint%s: it begins as it did.", unusable
        )
    else:
        logger.warning("The launcher started this run again: it goes on from its last checkpoint, %s", latest)
    return latest


def _version(candidate: CheckpointInfo) -> list[int]:
    """Return what changes if a checkpoint is replaced under its name."""
    facts = candidate.path.stat()
    return [facts.st_ino, facts.st_mtime_ns]


def _identity(peer: ProcessIdentity) -> Identity:
    return peer.pid, peer.pid_namespace, peer.start_time


def _read(record: Path) -> tuple[LaunchIdentity | None, dict[str, Any]]:
    try:
        written = json.loads(record.read_text(encoding="utf-8"))
        return LaunchIdentity.from_record(written["launch"]), dict(written["before"])
    except (OSError, ValueError, TypeError, KeyError):
        # There is none, or it is of another version: the run begins as its configuration says.
        return None, {}
