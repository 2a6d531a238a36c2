"""Track a run with MLflow."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, final

from stratagem.train.trackers.packages import require_package
from stratagem.train.trackers.tracker import SUMMARY, EndState, TrackedRecord, TrackedRun, Tracker, TrackingEnd
from stratagem.utils import import_module

__all__ = ["MLflowTracker"]

logger = logging.getLogger(__name__)

_ID_TAG: Final = "stratagem/id"
_PREFIX: Final = "stratagem"
# The class of the stores whose values this process can delete.
_DATABASE: Final = "SqlAlchemyStore"
_STATUS: Final[Mapping[EndState, str]] = {EndState.FAILED: "FAILED", EndState.INTERRUPTED: "KILLED"}
# The limits of MLflow.
_MOST_METRICS: Final = 1000
_MOST_PARAMS: Final = 100
_LONGEST_PARAM: Final = 6000
_LONGEST_TAG: Final = 5000
_LONGEST_NAME: Final = 250
_NOT_IN_NAMES: Final = re.compile(r"[^\w\-./: ]")


@final
class MLflowTracker(Tracker):
    """Track a run with MLflow. Needs ``pip install stratagem[mlflow]``.

    The configuration becomes parameters, and the lineage and the outcome become tags. A resumed run continues the same MLflow
    run, without the values of discarded iterations. MLflow servers cannot remove values; there, a resumed run that discards
    values continues in a new MLflow run, to which the remaining values are copied, and the earlier MLflow run is deleted.

    Args:
        experiment: the name of the experiment.
        name: the name of the run; by default the name of this run.
        tracking_uri: the server or database; by default the environment variable ``MLFLOW_TRACKING_URI``, or the SQLite file
            ``mlflow.db`` in the work directory.
        tags: further tags.

    Raises:
        MissingDependencyError: if MLflow is not installed.
    """

    def __init__(
        self,
        experiment: str = "stratagem",
        *,
        name: str | None = None,
        tracking_uri: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        require_package("mlflow", extra="mlflow")
        self._experiment, self._name, self._uri = experiment, name, tracking_uri
        self._tags = dict(tags or {})
        self._client: Any = None
        self._id = ""

    def prepare(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # At its default level, MLflow logs the creation of database tables.
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        import_module("mlflow", extra="mlflow")
        if (self._uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:").partition(":")[0] not in ("http", "https"):
            import_module("mlflow.store.tracking.sqlalchemy_store", extra="mlflow")

    def start(self, run: TrackedRun) -> None:
        uri = self._uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.work_dir / 'mlflow.db'}"
        self._client = import_module("mlflow", extra="mlflow").MlflowClient(tracking_uri=uri)
        experiment = self._client.get_experiment_by_name(self._experiment)
        experiment_id = (
            self._client.create_experiment(self._experiment) if experiment is None else experiment.experiment_id
        )
        found = self._client.search_runs([experiment_id], filter_string=f"tags.`{_ID_TAG}` = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            if run.resumed_at is not None:
                self._remove_discarded(experiment_id, run)
        else:
            self._id = self._create(experiment_id, run)
        self._describe(run)

    def log(self, record: TrackedRecord) -> None:
        position = {f"{record.mode}/{name}": value for name, value in record.position().items() if name != "iter"}
        self._log_metrics({**record.values, **position}, record.iteration, round(record.time * 1000))

    def finish(self, end: TrackingEnd) -> None:
        if end.state is not EndState.ROLLED_BACK:
            numbers = {
                f"{SUMMARY}/{name}": value for name, value in end.summary().items() if isinstance(value, int | float)
            }
            self._log_metrics(numbers, end.iteration, None)
            self._client.set_tag(self._id, f"{_PREFIX}/outcome", end.outcome[:_LONGEST_TAG])
            self._client.set_terminated(self._id, _STATUS.get(end.state, "FINISHED"))

    def _create(self, experiment_id: str, run: TrackedRun) -> str:
        created = self._client.create_run(
            experiment_id, run_name=self._name or run.name, tags={_ID_TAG: run.id, **self._tags}
        )
        return str(created.info.run_id)

    def _describe(self, run: TrackedRun) -> None:
        """Store the configuration and the lineage. MLflow's parameters cannot be changed; changes are listed in the lineage."""
        entities = import_module("mlflow.entities")
        known = self._client.get_run(self._id).data.params
        params = [
            entities.Param(name, value[:_LONGEST_PARAM])
            for name, value in _flat(run.config, ())
            if name not in known and value
        ]
        for chunk in _chunks(params, _MOST_PARAMS):
            self._client.log_batch(self._id, params=chunk)
        tags = [entities.RunTag(f"{_PREFIX}/{name}", value[:_LONGEST_TAG]) for name, value in run.facts.items()]
        for chunk in _chunks(tags, _MOST_PARAMS):
            self._client.log_batch(self._id, tags=chunk)

    def _log_metrics(self, values: Mapping[str, float], iteration: int, milliseconds: int | None) -> None:
        entities = import_module("mlflow.entities")
        now = milliseconds or import_module("mlflow.utils.time").get_current_time_millis()
        metrics = [entities.Metric(_name(name), float(value), now, iteration) for name, value in values.items()]
        for chunk in _chunks(metrics, _MOST_METRICS):
            self._client.log_batch(self._id, metrics=chunk)

    def _remove_discarded(self, experiment_id: str, run: TrackedRun) -> None:
        """Remove the values that do not remain part of the run."""
        names = list(self._client.get_run(self._id).data.metrics)
        history = {name: self._client.get_metric_history(self._id, name) for name in names}
        kept = {name: [each for each in values if run.keeps(name, each.step)] for name, values in history.items()}
        # keeps() is False for all iterations after the first discarded one.
        first = {name: min(each.step for each in history[name] if each not in kept[name])
                 for name in names if len(kept[name]) < len(history[name])}  # fmt: skip
        if not first:
            return
        store = self._client._tracking_client.store
        if type(store).__name__ == _DATABASE:
            self._delete_from_database(store, first, {name: kept[name] for name in first})
            return
        old, self._id = self._id, self._create(experiment_id, run)
        self._client.set_tag(self._id, f"{_PREFIX}/replaces", old)
        for chunk in _chunks([each for values in kept.values() for each in values], _MOST_METRICS):
            self._client.log_batch(self._id, metrics=chunk)
        self._client.set_tag(old, _ID_TAG, f"replaced by {self._id}")
        self._client.delete_run(old)
        logger.info(
            "Tracker mlflow: the run continues as %s, because the server cannot remove values from %s.", self._id, old
        )

    def _delete_from_database(self, store: Any, first: Mapping[str, int], kept: Mapping[str, Sequence[Any]]) -> None:
        """Delete the values of each metric from an iteration on, and restore its latest value, in one transaction."""
        models = import_module("mlflow.store.tracking.dbmodels.models")
        values, latest = models.SqlMetric, models.SqlLatestMetric
        with store.ManagedSessionMaker(read_only=False) as session:
            for name, step in first.items():
                session.query(values).filter(
                    values.run_uuid == self._id, values.key == name, values.step >= step
                ).delete()
                session.query(latest).filter(latest.run_uuid == self._id, latest.key == name).delete()
                if kept[name]:
                    last = max(kept[name], key=lambda each: (each.step, each.timestamp))
                    is_nan = math.isnan(last.value)
                    session.add(
                        latest(
                            run_uuid=self._id, key=name, value=0.0 if is_nan else last.value, is_nan=is_nan,
                            timestamp=last.timestamp, step=last.step,
                        )
                    )  # fmt: skip


def _name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:_LONGEST_NAME]


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the values of a nested configuration with their dotted names."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, (*path, str(key)))
    elif path:
        yield _name(".".join(path)), value if isinstance(value, str) else json.dumps(value, default=str)


def _chunks(items: Sequence[Any], length: int) -> Iterator[Sequence[Any]]:
    for begin in range(0, len(items), length):
        yield items[begin : begin + length]
