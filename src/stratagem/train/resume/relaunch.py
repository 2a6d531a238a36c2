"""Detect that the launcher restarted a run, which then resumes from its last checkpoint regardless of its configuration."""

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
from stratagem.storage import read_bytes, write_record

__all__ = ["LaunchIdentity", "find_restart_checkpoint"]

# Identifies a process: its ID, its PID namespace and its start time.
Identity = tuple[int, str, str]
# The file in the checkpoint folder that records the first start of a launch.
_RECORD = ".launch.json"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchIdentity:
    """Identifies the launch of a run, to detect restarts by torchrun or SLURM.

    Attributes:
        process: the identity of this process.
        run_id: the run ID of torchrun; None without torchrun.
        agents: the torchrun processes, which start the ranks and outlive them.
        job: the SLURM job ID, which a requeued job keeps; None without SLURM.
        restarts: the number of times that SLURM has restarted the job.
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
        """Return the identity of the current launch from the environment and the ``parents`` of all ranks."""
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
        """Return the identity that an earlier launch recorded."""
        process, agents = tuple(record["process"]), tuple(tuple(agent) for agent in record["agents"])
        return cls(**{**record, "process": process, "agents": agents})

    @property
    def may_restart(self) -> bool:
        """Whether the launcher can restart these ranks."""
        return self.run_id is not None or self.job is not None

    def continues(self, earlier: LaunchIdentity) -> bool:
        """Return whether this is the same launch as ``earlier``, or a restart of it.

        A launch is a restart if one of the torchrun agents is the same, or if SLURM has requeued the job since ``earlier``.
        A second ``srun`` in a job, or a rendezvous ID that is used again, is not a restart.
        """
        same_agent = (
            self.run_id is not None and self.run_id == earlier.run_id and set(self.agents) & set(earlier.agents)
        )
        requeued = self.job is not None and self.job == earlier.job and self.restarts > earlier.restarts
        return bool(same_agent) or requeued


def find_restart_checkpoint(folder: Path, launch: LaunchIdentity, logger: logging.Logger) -> Path | None:
    """Return the newest checkpoint that was saved since the first start of this launch; None if there is none.

    The first start records which checkpoints already exist in the work directory. Later starts ignore these checkpoints,
    regardless of their timestamps. Called on rank 0.
    """
    if not launch.may_restart:
        return None
    record = folder / _RECORD
    found = {str(each.path): each for each in list_checkpoints(folder)}
    present = {path: _version(each) for path, each in found.items()}
    earlier, before = _read(record)
    again = earlier is not None and launch.continues(earlier)
    write_record(record, json.dumps({"launch": asdict(launch), "before": before if again else present}), logger)
    if earlier is None or not again or earlier.process == launch.process:
        # Not a restart: a program may train twice in one process.
        return None
    own = [each for path, each in found.items() if before.get(path) != present[path]]
    latest = next((each.path for each in own if not each.fault), None)
    if latest is None:
        unusable = f" ({len(own)} saved since then are damaged)" if own else ""
        logger.warning(
            "The launcher restarted this run before its first usable checkpoint%s: starting as configured.", unusable
        )
    else:
        logger.warning("The launcher restarted this run: resuming from its last checkpoint, %s", latest)
    return latest


def _version(candidate: CheckpointInfo) -> list[int]:
    """Return values that change if a checkpoint is replaced by another one with the same name."""
    facts = candidate.path.stat()
    return [facts.st_ino, facts.st_mtime_ns]


def _identity(peer: ProcessIdentity) -> Identity:
    return peer.pid, peer.pid_namespace, peer.start_time


def _read(record: Path) -> tuple[LaunchIdentity | None, dict[str, Any]]:
    try:
        written = json.loads(read_bytes(record))
        return LaunchIdentity.from_record(written["launch"]), dict(written["before"])
    except (OSError, ValueError, TypeError, KeyError):
        # There is no record, or a different version wrote it, so the run starts as configured.
        return None, {}
