"""Track a run with Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

from stratagem.errors import ConfigValueError
from stratagem.storage import atomic_file
from stratagem.train.trackers.packages import require_package
from stratagem.train.trackers.tracker import EndState, TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.train.trackers.wandb_log import TransactionLogWriter, read_transaction_log
from stratagem.utils import did_you_mean, import_module, mask_text

__all__ = ["WandbTracker"]

logger = logging.getLogger(__name__)

_MODES: Final = ("online", "offline")
# W&B numbers the rows of a run with increasing steps and stores one row per step. Each iteration has room for several records
# of the training and several of evaluations, so that every record is stored at once, as a separate row.
_ROWS_PER_ITERATION: Final = 10
_FIRST_EVALUATION_ROW: Final = 5
_EXIT_CODES: Final[Mapping[EndState, int]] = {EndState.FAILED: 1, EndState.INTERRUPTED: 255}
_FLUSH_INTERVAL: Final = "x_transaction_log_flush_interval"


@final
class WandbTracker(Tracker):
    """Track a run with Weights & Biases. Needs ``pip install stratagem[wandb]``.

    The x-axis of all values is ``iter``, the number of completed iterations. A resumed run continues the same W&B run. Offline,
    the rows of discarded iterations are removed from the files of the earlier sessions; online, the run is rewound.

    Args:
        project: the project; by default the environment variable ``WANDB_PROJECT``, or ``stratagem``.
        entity: the user or team.
        name: the display name; by default the name of the run.
        group: the group.
        tags: tags.
        notes: a description.
        mode: "online" or "offline"; by default the environment variable ``WANDB_MODE``, or online.
        settings: further fields of ``wandb.Settings``. By default, W&B prints nothing, captures no console output, and stores
            neither the command line nor uncommitted changes, since these can contain secrets.

    Raises:
        MissingDependencyError: if wandb is not installed.
        ConfigValueError: if the mode is unknown.
    """

    def __init__(
        self,
        project: str | None = None,
        *,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        mode: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        require_package("wandb", extra="wandb")
        if mode is not None and mode not in _MODES:
            raise ConfigValueError(f"WandbTracker: unknown mode={mode!r}. {did_you_mean(mode, _MODES)}")
        self._project, self._name, self._mode = project, name, mode
        self._options = {"entity": entity, "group": group, "tags": list(tags) or None, "notes": notes}
        self._settings = dict(settings or {})
        self._run: Any = None
        self._last_step = -1

    def prepare(self) -> None:
        import_module("wandb", extra="wandb")

    def start(self, run: TrackedRun) -> None:
        offline = (self._mode or os.environ.get("WANDB_MODE")) == "offline"
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.resumed_at is not None and offline:
            for path in sorted(run.folder.glob(f"wandb/*-{run.id}/run-{run.id}.wandb")):
                _remove_discarded(path, run)
        self._run = self._resume(run) if run.resumed_at is not None and not offline else self._init(run, resume="allow")
        self._last_step = -1
        self._run.define_metric("*", step_metric="iter")
        self._run.config.update({"lineage": dict(run.facts)}, allow_val_change=True)
        if not offline:
            logger.info("Tracker wandb: %s", mask_text(str(self._run.url)))

    def log(self, record: TrackedRecord) -> None:
        first = 0 if record.mode == "train" else _FIRST_EVALUATION_ROW
        step = max(record.iteration * _ROWS_PER_ITERATION + first, self._last_step + 1)
        self._run.log({**record.values, **record.position()}, step=step, commit=True)
        self._last_step = step

    def finish(self, end: TrackingEnd) -> None:
        if end.state is not EndState.ROLLED_BACK:
            self._run.summary.update(end.summary())
        self._run.finish(exit_code=_EXIT_CODES.get(end.state, 0))

    def _resume(self, run: TrackedRun) -> Any:
        """Continue an online run after the rows that remain part of it."""
        at = run.resumed_at or 0
        last = at * _ROWS_PER_ITERATION + (_ROWS_PER_ITERATION if run.validated else _FIRST_EVALUATION_ROW) - 1
        try:
            return self._init(run, resume_from=f"{run.id}?_step={last}")
        except Exception as error:  # noqa: BLE001 -- W&B raises errors of different types
            logger.warning(
                "Tracker wandb: the run cannot be rewound to iteration %d (%s: %s). It continues, and what was logged for later "
                "iterations remains in it.", at, type(error).__name__, mask_text(str(error)),
            )  # fmt: skip
            return self._init(run, resume="allow")

    def _init(self, run: TrackedRun, **how: Any) -> Any:
        wandb = import_module("wandb", extra="wandb")
        known = wandb.Settings.model_fields
        settings = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "x_disable_meta": True,
            "finish_timeout": self.flush_s,
            # A killed run resumes at a checkpoint; the rows before it must be in the file by then.
            _FLUSH_INTERVAL: 1.0,
        }
        defaults = {name: value for name, value in settings.items() if name in known}
        identity = {} if "resume_from" in how else {"id": run.id}
        return wandb.init(
            project=self._project or os.environ.get("WANDB_PROJECT") or "stratagem",
            name=self._name or run.name,
            dir=str(run.folder),
            config=dict(run.config),
            mode=self._mode,
            settings=wandb.Settings(**{**defaults, **self._settings}),
            **self._options,
            **identity,
            **how,
        )


def _remove_discarded(path: Path, run: TrackedRun) -> None:
    """Remove the rows that do not remain part of the run from the file of an earlier session, if there are any."""
    record_class = import_module("wandb.proto.wandb_internal_pb2").Record
    records = list(read_transaction_log(path))
    kept = [data for data in records if _is_kept(record_class.FromString(data), run)]
    if len(kept) == len(records):
        return
    if path.with_name(f"{path.name}.synced").exists():
        logger.warning(
            "Tracker wandb: %s was already uploaded. What it contains for iterations after %d remains in the online run.",
            path, run.resumed_at,
        )  # fmt: skip
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        writer = TransactionLogWriter(file)
        for data in kept:
            writer.write(data)


def _is_kept(record: Any, run: TrackedRun) -> bool:
    if record.WhichOneof("record_type") != "history":
        return True
    values = dict(_items(record.history))
    iteration = values.get("iter")
    names = [name for name in values if "/" in name]
    return iteration is None or all(run.keeps(name, int(iteration)) for name in names)


def _items(history: Any) -> Iterator[tuple[str, Any]]:
    for item in history.item:
        yield item.key or "/".join(item.nested_key), json.loads(item.value_json)
