"""Begin, rewind and end the sessions of the trackers with those of the run."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from stratagem._version import __version__
from stratagem.optim import OptimWrapperDict
from stratagem.storage import read_bytes, write_record
from stratagem.train.hooks.checkpoint import CheckpointHook
from stratagem.train.run.context import Run
from stratagem.train.trackers.tracker import EndState, TrackedRun, TrackingEnd
from stratagem.train.trackers.tracking import TrackedIdentity
from stratagem.utils import absolute, is_url, mask_text
from stratagem.utils.git_revision import git_revision

__all__ = ["adopt_tracking", "begin_tracking", "rewind_tracking", "tracked_session"]

# The file in the work directory that lists the runs of trackers.
_RECORD: Final = "trackers.json"


def adopt_tracking(
    run: Run, meta: Mapping[str, Any], *, resumed: bool, loaded_from: str | os.PathLike[str] | None
) -> None:
    """Continue the tracked run of a checkpoint if the run resumes in the same work directory; otherwise remember the link to it.

    Args:
        run: the run.
        meta: the entry ``meta`` of the checkpoint.
        resumed: whether the run resumes from the checkpoint, rather than only loading its weights.
        loaded_from: the configured checkpoint, from which the run does not resume.
    """
    saved = TrackedIdentity.from_meta(meta)
    checkpoint = run.strategy.resumed_from if resumed else loaded_from
    text = None if checkpoint is None else mask_text(os.fspath(checkpoint))
    if resumed and saved is not None and _is_of_work_dir(run, saved, checkpoint):
        run.tracking.identity = saved
    else:
        run.tracking.started_from(None if saved is None else saved.id, text)


def begin_tracking(run: Run) -> None:
    """Begin a session of the trackers on rank 0, if there are any.

    Raises:
        MissingDependencyError: if a package of a tracker is not installed.
    """
    tracking = run.tracking
    if run.rank != 0 or not tracking.names:
        return
    is_new = tracking.identity is None
    identity = tracking.identify(run.strategy.timestamp)
    tracking.begin(_tracked_run(run, identity, is_new=is_new), lambda: _updates(run))
    run.recorders.append(tracking)
    run.logger.info("Trackers: %s (run %s)", ", ".join(tracking.names), identity.id)
    _record(run, identity)


def rewind_tracking(run: Run) -> None:
    """Continue the tracked run from the current position, to which the run was rolled back."""
    tracking = run.tracking
    if tracking in run.recorders and tracking.identity is not None:
        end = _end(run, EndState.ROLLED_BACK, f"rolled back to iteration {run.iter}")
        tracking.rewind(end, _tracked_run(run, tracking.identity, is_new=False))


@contextmanager
def tracked_session(run: Run) -> Iterator[None]:
    """End the session of the trackers, if one has begun, when the context exits."""
    try:
        yield
    finally:
        if run.tracking in run.recorders:
            run.recorders.remove(run.tracking)
            run.tracking.finish(_end(run, *run.tracking.outcome))


def _end(run: Run, state: EndState, outcome: str) -> TrackingEnd:
    hooks = [hook for hook in run.events.hooks if isinstance(hook, CheckpointHook)]
    best = {f"val/{name}": value for hook in hooks for name, value in hook.best_values.items()}
    return TrackingEnd(
        state=state,
        outcome=outcome,
        epoch=run.epoch,
        iteration=run.iter,
        best=best,
        last=run.tracking.last_evaluations,
    )


def _updates(run: Run) -> Mapping[str, int]:
    optim = run.optim_wrapper
    if isinstance(optim, OptimWrapperDict):
        return {f"{name}.updates": wrapper.num_steps_applied for name, wrapper in optim.items()}
    return {"updates": optim.num_steps_applied}


def _tracked_run(run: Run, identity: TrackedIdentity, *, is_new: bool) -> TrackedRun:
    strategy, work_dir = run.strategy, absolute(run.work_dir)
    return TrackedRun(
        id=identity.id,
        name=work_dir.name if strategy.experiment_name == strategy.timestamp else strategy.experiment_name,
        work_dir=work_dir,
        folder=work_dir / identity.session,
        config=_plain(run.tracking.config),
        facts={**_lineage(run, identity), **_environment(run)},
        resumed_at=None if is_new else run.iter,
        validated=run.progress.validated == run.iter,
    )


def _plain(value: Any) -> Any:
    """Return a redacted configuration as values that JSON can represent."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return str(value) if isinstance(value, str) else mask_text(str(value))


def _lineage(run: Run, identity: TrackedIdentity) -> dict[str, str]:
    sessions = run.history.sessions
    current = sessions[-1]
    facts = {
        "session": current.name,
        "previous_session": sessions[-2].name if len(sessions) > 1 else None,
        "resumed_from": current.checkpoint,
        "changes": "\n".join(current.changes) or None,
        "parent_run": identity.parent,
        "parent_checkpoint": identity.parent_checkpoint,
    }
    return {name: value for name, value in facts.items() if value is not None}


def _environment(run: Run) -> dict[str, str]:
    strategy = run.strategy
    sizes = {parameter: strategy.global_numel(parameter) for parameter in run.model.parameters()}
    facts = {
        "git_revision": git_revision(),
        "stratagem": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "work_dir": mask_text(str(absolute(run.work_dir))),
        "strategy": type(strategy).__name__,
        "world_size": str(run.world_size),
        "device": str(run.world.device),
        "seed": str(strategy.seed),
        "model": type(strategy.unwrap_model()).__name__,
        "parameters": str(sum(sizes.values())),
        "trainable_parameters": str(sum(size for parameter, size in sizes.items() if parameter.requires_grad)),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _record(run: Run, identity: TrackedIdentity) -> None:
    """Add the run to the record in the work directory."""
    entry = {**identity.as_meta()["tracking"], "trackers": list(run.tracking.names)}
    runs = {**_recorded(Path(run.work_dir)), identity.id: entry}
    write_record(Path(run.work_dir) / _RECORD, json.dumps({"runs": runs}, indent=1) + "\n", run.logger)


def _recorded(work_dir: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads(read_bytes(work_dir / _RECORD))["runs"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_of_work_dir(run: Run, saved: TrackedIdentity, checkpoint: str | os.PathLike[str] | None) -> bool:
    work_dir = Path(run.work_dir)
    if saved.id in _recorded(work_dir):
        return True
    # The record can be missing if only checkpoints were copied to this machine.
    return checkpoint is not None and not is_url(checkpoint) and absolute(work_dir) in absolute(checkpoint).parents
